"""[mesh] -> HOW MANY ALONG EACH AXIS. The devices of a training run as a grid; nothing heavy."""

from dataclasses import dataclass, fields, replace

from xverse.errors import XverseError

# Outermost first: ranks of one `tensor` group are neighbours, for they talk the most.
ORDER = ("pipeline", "data", "shard", "expert", "context", "tensor")


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How many devices along each axis; their product is the number of processes."""

    data: int = 1
    """Copies of the model."""
    shard: int = 0
    """Devices that share a copy of weights, gradients and moments (FSDP2); 0: all that are left."""
    tensor: int = 1
    """Devices that each have a part of every matrix, and of the tokens between them."""
    pipeline: int = 1
    """Devices that each have some of the layers, one after another."""
    context: int = 1
    """Devices that each have a part of every row, for long ones."""
    expert: int = 1
    """Devices that each have some of the experts of a mixture; for all else they are `shard`."""
    interleave: int = 1
    """Pieces of the model that a device of the pipeline has: more, shorter ones idle less."""

    def resolve(self, ranks: int) -> "Axes":
        """The same with `shard` told, for so many processes. XverseError where the product of the
        axes is not `ranks`."""
        for field in fields(self):
            size, least = getattr(self, field.name), int(field.name != "shard")
            if type(size) is not int or size < least:
                raise XverseError(
                    f"The mesh has {size!r:.40} for {field.name!r}.",
                    f"It is a whole number, {least} or more.",
                    "Correct it in [mesh].",
                )
        others = self.data * self.tensor * self.pipeline * self.context * self.expert
        found = replace(self, shard=self.shard or max(1, ranks // others))
        if others * found.shard != ranks:
            told = " x ".join(f"{name} {getattr(found, name)}" for name in ORDER)
            raise XverseError(
                f"The mesh has {others * found.shard} devices, and there are {ranks} processes.",
                f"It is {told}; their product must be the number of processes.",
                "Correct [mesh], or start another number of processes with torchrun.",
            )
        if found.interleave > 1 and found.pipeline == 1:
            raise XverseError(
                f"The mesh has {found.interleave} pieces for each device of a pipeline of one.",
                "Pieces are interleaved between the devices of a pipeline.",
                "Set pipeline to 2 or more in [mesh], or leave interleave at 1.",
            )
        return found

    @property
    def readers(self) -> int:
        """How many groups of ranks read other rows than each other; of a resolved mesh."""
        return self.data * self.shard * self.expert
