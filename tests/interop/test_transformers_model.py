"""XverseForCausalLM by itself: logits, padding, gradients, generate, save and load."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_model import published_config
from xverse.checkpoint.load import load
from xverse.engine.request import Sampling
from xverse.engine.simple import decode
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from tests.interop.published import GREEDY, HISTORY, PROMPTS, load_pair, same_state  # noqa: E402
from xverse.interop.transformers import XverseForCausalLM  # noqa: E402


def full_logits(decoder: Decoder, ids_BT: Tensor) -> Tensor:
    kv = Packed([ids_BT.shape[1]] * len(ids_BT))
    return decoder(ids_BT.flatten(), kv.positions(), kv).unflatten(0, ids_BT.shape)


def random_ids(*shape: int) -> Tensor:
    return torch.randint(6, 400, shape, generator=torch.Generator().manual_seed(0))


class TestForward:
    def test_logits_are_the_decoders(self, folder: Path) -> None:
        model, _ = load_pair(folder)
        ids = random_ids(3, 11)
        with torch.no_grad():
            output = model(ids)
            assert torch.allclose(output.logits, full_logits(model.decoder, ids), atol=1e-5)
            step = model(ids[:, :5], use_cache=True)
            rest = model(ids[:, 5:], past_key_values=step.past_key_values)
            last = model(ids, logits_to_keep=1, return_dict=False)[0]
        steps = torch.cat((step.logits, rest.logits), dim=1)
        assert torch.allclose(steps, output.logits, atol=1e-4)
        assert torch.allclose(last, output.logits[:, -1:], atol=1e-4)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_padding_changes_nothing(self, folder: Path, side: str, dynamic: bool) -> None:
        config = AutoConfig.from_pretrained(folder)
        config.max_position_embeddings = 6  # so that dynamic scaling sets in
        if dynamic:
            config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        model = XverseForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
            assert not logits.isnan().any()
            for text, got, mask in zip(PROMPTS, logits, batch.attention_mask.bool(), strict=True):
                alone = model(tokenizer(text, return_tensors="pt").input_ids).logits[0]
                assert torch.allclose(got[mask], alone, atol=1e-4)

    def test_masks_of_a_wrong_size_are_named(self, folder: Path) -> None:
        model, _ = load_pair(folder)
        ids = random_ids(2, 5)
        with pytest.raises(XverseError, match=r"\[2, 4\]"):
            model(ids, attention_mask=torch.ones(2, 4))
        with pytest.raises(XverseError, match="3 dimensions"):
            model(ids, attention_mask=torch.ones(2, 1, 5))
        with pytest.raises(XverseError, match=r"\[5\]"):
            model(ids[0])
        with pytest.raises(XverseError, match="not kept"):
            model(ids, output_hidden_states=True)

    def test_gradients_reach_every_weight(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        model.chat(tokenizer, HISTORY, generation_config=GREEDY)  # leaves nothing in the way
        ids = random_ids(4, 16)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        labels = ids.masked_fill(mask == 0, -100)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            output = model(ids, attention_mask=mask, labels=labels)
            output.loss.backward()
            assert all(weight.grad is not None for weight in model.parameters())
            assert model.lm_head.weight.grad.abs().sum() > 0
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
        assert losses[2] < losses[0] - 0.5
        flat = output.logits[:, :-1].flatten(0, 1).float()
        expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert same_state(
            load_pair(folder)[0].decoder, load(folder, dtype="float32", device="cpu").decoder
        )

    def test_weights_are_where_others_look_for_them(self, folder: Path) -> None:
        model, _ = load_pair(folder)
        modules = {name for name, _ in model.named_modules()}
        assert "model.layers.0.self_attn.q_proj" in modules
        assert not any(name.startswith("decoder") for name in modules)
        assert model.get_input_embeddings() is model.model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head
        assert model.num_parameters() == model.decoder.shape.num_parameters
        half = model.half()
        assert half.decoder.lm_head is half.lm_head
        assert next(half.decoder.parameters()).dtype == torch.float16

    def test_a_copy_is_whole(self, folders: dict[str, Path]) -> None:
        model, tokenizer = load_pair(folders["dense"])
        answer = model.chat(tokenizer, HISTORY, generation_config=GREEDY)
        other = copy.deepcopy(model)
        assert other.decoder.lm_head is other.lm_head
        with torch.no_grad():
            other.lm_head.weight.neg_()
        assert model.chat(tokenizer, HISTORY, generation_config=GREEDY) == answer
        assert other.chat(tokenizer, HISTORY, generation_config=GREEDY) != answer
        model.load_state_dict(other.state_dict())
        assert same_state(model, other)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    @pytest.mark.parametrize("bits", [None, 8, 4])
    def test_on_a_gpu(self, folder: Path, tmp_path: Path, bits: int | None) -> None:
        """The guides' order of calls: quantize on the CPU, then .cuda()."""
        model, tokenizer = load_pair(folder, torch.float16)
        if bits:
            model = model.quantize(bits)
        model = model.cuda().eval()
        assert model.device.type == "cuda"
        assert isinstance(model.chat(tokenizer, HISTORY), str)
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt").to("cuda")
        assert model.generate(**batch, max_new_tokens=4).device.type == "cuda"
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
        assert again.device.type == "cuda"
        assert same_state(again, model)

    def test_float16_runs_on_a_cpu(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder, torch.float16)
        assert model.dtype == torch.float16
        assert isinstance(model.chat(tokenizer, HISTORY), str)
        assert model.generate(random_ids(1, 4), max_new_tokens=2).shape[0] == 1


class TestGenerate:
    def test_greedy_is_the_engines(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        for text in PROMPTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            got = model.generate(ids, generation_config=GREEDY)[0, ids.shape[1] :].tolist()
            sampling = Sampling(max_tokens=24).over({})
            tokens = decode(model.decoder, [ids[0].tolist()], [sampling], end_ids={3})
            assert got == [token.id for token in tokens]

    def test_a_left_padded_batch_gives_solo_answers(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        answers = model.generate(**batch, generation_config=GREEDY)[:, batch.input_ids.shape[1] :]
        for text, answer in zip(PROMPTS, answers.tolist(), strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            alone = model.generate(ids, generation_config=GREEDY)[0, ids.shape[1] :].tolist()
            assert answer[: len(alone)] == alone
            assert set(answer[len(alone) :]) <= {tokenizer.pad_token_id}

    def test_caches_and_beams(self, folders: dict[str, Path]) -> None:
        model, tokenizer = load_pair(folders["dense"])
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        for beams in (1, 3):
            options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
            options["repetition_penalty"] = 1.0
            plain = model.generate(**batch, **options)
            assert torch.equal(model.generate(**batch, **options, use_cache=False), plain)
            static = model.generate(**batch, **options, cache_implementation="static")
            assert torch.equal(static, plain)

    def test_sampling(self, folder: Path) -> None:
        model, tokenizer = load_pair(folder)
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        torch.manual_seed(1)
        first = model.generate(ids, do_sample=True, max_new_tokens=8)
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, do_sample=True, max_new_tokens=8), first)
        assert model.generation_config.top_k == 30  # generation_config.json is taken


class TestSave:
    def test_it_comes_back_everywhere(self, folder: Path, tmp_path: Path) -> None:
        model, tokenizer = load_pair(folder, torch.bfloat16)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        tokenizer.save_pretrained(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        config = json.loads((tmp_path / "config.json").read_text())
        published = published_config(moe=folder.name == "moe")
        kept = published.keys() - {"auto_map", "torch_dtype", "transformers_version", "use_cache"}
        assert {key: config[key] for key in kept} == {key: published[key] for key in kept}
        assert config["dtype"] == "bfloat16"
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert same_state(again, model)
        assert same_state(load(tmp_path, device="cpu").decoder, model.decoder)
        assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
        assert again.config.shape() == model.config.shape()

    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantized_it_comes_back_bit_for_bit(
        self, folder: Path, tmp_path: Path, bits: int
    ) -> None:
        model, tokenizer = load_pair(folder, torch.bfloat16)
        model.quantize(bits).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert same_state(again, model)
        assert same_state(load(tmp_path, device="cpu").decoder, model.decoder)
        ids = random_ids(1, 6)
        expected = model.generate(ids, generation_config=GREEDY)
        assert torch.equal(again.generate(ids, generation_config=GREEDY), expected)
        again.save_pretrained(tmp_path / "twice")
        assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), model)

    def test_dense_ones_are_plain_llamas(self, folders: dict[str, Path], tmp_path: Path) -> None:
        model, _ = load_pair(folders["dense"])
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        llama = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(llama) is transformers.LlamaForCausalLM
        ids = random_ids(2, 20)
        with torch.no_grad():
            assert torch.allclose(llama(ids).logits, model(ids).logits, atol=1e-4)

    def test_saved_over_itself(self, folders: dict[str, Path], tmp_path: Path) -> None:
        """The weights in use are on the map of the very files that are replaced."""
        load_pair(folders["dense"], torch.bfloat16)[0].save_pretrained(tmp_path)
        (shard,) = tmp_path.glob("*.safetensors")
        shard.rename(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors.index.json").unlink()
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_what_trainer_passes(self, folder: Path, tmp_path: Path) -> None:
        model, _ = load_pair(folder)
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state, is_main_process=True)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight + 1)
        model.save_pretrained(tmp_path / "other", is_main_process=False)
        assert not (tmp_path / "other").exists()

    def test_what_is_not_done_is_said(self, folders: dict[str, Path], tmp_path: Path) -> None:
        model, _ = load_pair(folders["dense"])
        with pytest.raises(XverseError, match="safe_serialization"):
            model.save_pretrained(tmp_path, safe_serialization=False)
        for size in ("5 parsecs", 0, -1, True):
            with pytest.raises(XverseError, match="shard"):
                model.save_pretrained(tmp_path, max_shard_size=size)
        with pytest.raises(XverseError, match="not resized"):
            model.resize_token_embeddings(1000)
