"""TRANSFORMERS' CACHE -> KV DOOR. The decoder's row of tokens as the batch they came from."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from xverse.errors import XverseError


class HuggingFaceKV:
    """The KV door over a `transformers.Cache`: B sequences of T new tokens, one after another.

    `mask`: [B, past + T], zero where a sequence is padded; or [B, 1, T, S] for ready-made masks,
    boolean (True is seen) or added to the scores; None where nothing is padded.
    """

    def __init__(
        self, cache: Cache | None, positions_BT: Tensor, mask: Tensor | None = None
    ) -> None:
        self.cache = cache
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.batch, self.tokens = positions_BT.shape
        self.positions_BT = positions_BT
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()
            mask = None if bool(mask.all()) else mask
        self.mask = mask
        # Static caches of early 5.x are told where to write; later ones count by themselves.
        new = torch.arange(self.past, self.past + self.tokens, device=positions_BT.device)
        self._places = {"cache_position": new}
        self._visible: dict[int, Tensor | None] = {}  # by how many keys there are

    def lengths(self) -> Tensor:
        """How many tokens the sequence of each new token holds by now, padding aside: [B * T]."""
        return (self.positions_BT.amax(-1, keepdim=True) + 1).expand_as(self.positions_BT).flatten()

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Keep k and v in the cache, and mix what each q may see. -> [B * T, H, E]."""
        size = (self.batch, self.tokens)
        q_BHTE, k_BKSE, v_BKSE = (
            x.unflatten(0, size).transpose(1, 2) for x in (q_THE, k_TKE, v_TKE)
        )
        if self.cache is not None:
            k_BKSE, v_BKSE = self.cache.update(k_BKSE, v_BKSE, layer, self._places)
        seen = k_BKSE.shape[2]
        if seen not in self._visible:
            self._visible[seen] = self._look(seen)
        mask = self._visible[seen]
        mixed_BHTE = functional.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask,
            is_causal=mask is None and self.tokens > 1,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )
        return mixed_BHTE.transpose(1, 2).flatten(0, 1)

    def _look(self, seen: int) -> Tensor | None:
        """Which of `seen` keys each query sees, [B, 1, T, S]; None for plain causal attention."""
        mask = self.mask
        if mask is not None and mask.dim() == 4:
            return mask
        if mask is None and seen == self.past + self.tokens and self.tokens in (1, seen):
            return None
        queries_T = self._places["cache_position"]
        keys_S = torch.arange(seen, device=queries_T.device)
        causal_TS = keys_S <= queries_T[:, None]
        if mask is None:
            return causal_TS[None, None]
        # A static cache has room to come, which no query reaches.
        real_BS = functional.pad(mask, (0, seen - mask.shape[1]))
        # Padding sees itself: a query that sees nothing would be NaN, and spread.
        itself_TS = keys_S == queries_T[:, None]
        return (causal_TS & real_BS[:, None, None]) | itself_TS


def positions_of(
    ids_BT: Tensor, past: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Place of every new token in its sequence, [B, T]: as given, or counted over the mask.

    Raises XverseError for a mask of another size than the tokens it is for.
    """
    batch, tokens = ids_BT.shape
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape != (batch, past + tokens):
            raise XverseError(
                f"The attention mask is {list(attention_mask.shape)}, and the tokens it is for are "
                f"{[batch, past + tokens]}.",
                f"It covers the {past} tokens in the cache and the {tokens} new ones.",
                "Extend the mask along with the tokens.",
            )
        if position_ids is None:
            counted = attention_mask.long().cumsum(-1) - 1
            return counted.clamp(min=0)[:, past:]
    elif attention_mask is not None and (attention_mask.dim() != 4 or position_ids is None):
        raise XverseError(
            f"An attention mask of {attention_mask.dim()} dimensions is not understood.",
            "It is [sequences, tokens], or with position_ids [sequences, 1, tokens, keys].",
            "Give the tokenizer's attention_mask.",
        )
    if position_ids is None:
        position_ids = torch.arange(past, past + tokens, device=ids_BT.device)[None]
    return position_ids.expand(batch, tokens)
