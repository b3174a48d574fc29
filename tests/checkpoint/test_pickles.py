"""The pickle machine: what torch.save writes is read, and nothing else ever runs."""

import pickle
import random
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint.archives import (
    name,
    number,
    program,
    state_dict,
    storage,
    tensor,
    text,
    tuple_of,
    write_checkpoint,
)
from xverse.checkpoint import pickles
from xverse.checkpoint.archive import Malformed
from xverse.checkpoint.pickles import StoredTensor, read_pickle
from xverse.checkpoint.weights import PickleFile
from xverse.errors import XverseError

GOOD = state_dict(w=tensor())
FLOATS = torch.arange(6, dtype=torch.float32)

# Each would run, fetch or overwrite something if it were called with the canary's path.
CALLS = [
    "os.system",
    "posix.system",
    "nt.system",
    "os.popen",
    "os.remove",
    "os.execv",
    "os.putenv",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.open",
    "builtins.getattr",
    "builtins.__import__",
    "__builtin__.eval",
    "importlib.import_module",
    "runpy.run_path",
    "runpy._run_code",
    "shutil.rmtree",
    "pathlib.Path.write_text",
    "ctypes.CDLL",
    "pty.spawn",
    "timeit.timeit",
    "cProfile.run",
    "pdb.run",
    "pydoc.pipepager",
    "code.interact",
    "webbrowser.open",
    "socket.create_connection",
    "urllib.request.urlopen",
    "types.FunctionType",
    "types.CodeType",
    "functools.partial",
    "operator.attrgetter",
    "operator.methodcaller",
    "codecs.encode",
    "copyreg._reconstructor",
    "collections.namedtuple",
    "logging.config.listen",
    "numpy.core.multiarray._reconstruct",
    "numpy.load",
    "pickle.loads",
    "marshal.loads",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.serialization.load",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_from_type_v2",
    "torch._utils._rebuild_qtensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._import_dotted_name",
    "torch._utils.__builtins__.eval",
    "transformers.AutoModel.from_pretrained",
    "modeling_xverse.XverseForCausalLM",
]


def sizes(*counts: int) -> bytes:
    """Push a tuple of ints."""
    return tuple_of(*map(number, counts))


def laughs() -> bytes:
    """A tuple that takes 10**30 elements to print: 30 levels of ten times the one below."""
    body = b"(](" + text("ha") * 10 + b"e"
    for level in range(30):
        index = bytes([level])
        body += b"q" + index + b"](" + b"h" + index + (b"h" + index) * 9 + b"e"
    return body + b"t"


def built(state: bytes) -> bytes:
    """A whole pickle: a good dict, whose attributes are then set to `state`."""
    return program(b"}" + text("w") + tensor() + b"s" + state + b"b")


ORDERED_DICT = name("collections", "OrderedDict")
CALL = name("posix", "system") + tuple_of(text("true"))
STREAMS = {
    "INST": program(b"(" + text("true") + b"iposix\nsystem\n"),
    "OBJ": program(b"(" + name("posix", "system") + text("true") + b"o"),
    "NEWOBJ": program(ORDERED_DICT + b")\x81"),
    "NEWOBJ_EX": program(ORDERED_DICT + b")}\x92"),
    "EXT1": program(b"\x82\x01"),
    "EXT2": program(b"\x83\x01\x00"),
    "EXT4": program(b"\x84\x01\x00\x00\x00"),
    "PERSID": program(b"P0\n"),
    "unknown opcode": program(b"\xff"),
    "protocol 0": pickle.dumps({"w": 1}, protocol=0),
    "protocol 9": b"\x80\x09}.",
    "stack global": program(text("posix") + text("system") + b"\x93" + tuple_of() + b"R"),
    "stack global of a container": program(laughs() + text("system") + b"\x93"),
    "stack global from the memo": program(
        text("posix") + b"q\x00" + text("system") + b"q\x01}" + b"h\x00h\x01\x93"
    ),
    "dotted walk": program(name("torch", "_utils._rebuild_tensor_v2.__globals__")),
    "nested reduce": state_dict(w=ORDERED_DICT + tuple_of(CALL + b"R") + b"R"),
    "call inside a tensor": state_dict(w=tensor(storage(), CALL + b"R")),
    "call inside metadata": program(b"}" + b"}" + text("_metadata") + CALL + b"R" + b"sb"),
    "hidden in a memo": program(CALL + b"R" + b"q\x000}"),
    "call of a storage": program(name("torch", "FloatStorage") + sizes(9) + b"R"),
    "call of a dtype": program(name("torch", "uint16") + b")R"),
    "call of a string": program(text("posix.system") + b")R"),
    "call of laughs": program(laughs() + b")R"),
    "call of a dict": program(b"})R"),
    "call with a list": program(ORDERED_DICT + b"]R"),
    "dict from arguments": program(ORDERED_DICT + tuple_of(b"]") + b"R"),
    "build on a tensor": program(tensor() + b"}b"),
    "build on a name": program(name("torch", "FloatStorage") + b"}b"),
    "build of __class__": built(b"}" + text("__class__") + text("x") + b"s"),
    "build of __dict__": built(b"}" + text("__dict__") + b"}s"),
    "build of __setstate__": built(b"}" + text("__setstate__") + ORDERED_DICT + b"s"),
    "build of slots": built(tuple_of(b"N", b"}")),
    "build of a number as key": built(b"}" + number(1) + number(1) + b"s"),
    "build of nothing": built(b"N"),
    "no dict": program(number(1)),
    "a list": program(b"]"),
    "no tensor": program(b"}" + text("step") + number(7) + b"s"),
    "deep tuples": program(b")" + b"\x85" * 90_000),
    "deep tuples in a dict": state_dict(a=b")" + b"\x85" * 90_000),
    "deep lists": program(b"]" * 200_000),
    "deep marks": program(b"(" * 200_000),
    "laughs": program(laughs()),
    "laughs as a shape": state_dict(w=tensor(storage(), number(0), tuple_of(laughs()), sizes(1))),
    "laughs as a key": program(b"}" + laughs() + text("x") + b"s"),
    "a dict in itself": program(b"}q\x00" + text("me") + b"h\x00s"),
    "tuple as a key": program(b"})" + text("x") + b"s"),
    "key twice": program(b"}" + (text("w") + tensor() + b"s") * 2),
    "key without value": program(b"}(" + text("w") + b"u"),
    "items into a list": program(b"]" + text("a") + text("b") + b"s"),
    "append to a dict": program(b"}" + text("a") + b"a"),
    "items into nothing": program(b"(u"),
    "mark below": program(text("a") + b"(\x85t"),
    "no mark": program(b"t"),
    "empty stack": program(b"\x85"),
    "nothing left": program(b""),
    "two left": program(b"}}"),
    "open mark": program(b"}("),
    "more after the end": GOOD + b"cposix\nsystem\n.",
    "no end": GOOD[:-1],
    "unknown memo": program(b"h\x07"),
    "unknown long memo": program(b"j\xff\xff\xff\xff"),
    "string past the end": program(b"X\xff\xff\xff\x7fab"),
    "string of 2**63": program(b"\x8d" + b"\xff" * 8),
    "long string": program(text("a" * 70_000)),
    "broken UTF-8": program(b"X\x02\x00\x00\x00\xff\xfe"),
    "surrogate": program(text("\ud800")),
    "frame past the end": program(b"\x95" + b"\xff" * 8),
    "endless name": program(b"c" + b"a" * 100_000),
    "storage without a tuple": program(text("0") + b"Q"),
    "storage of another tag": program(
        tuple_of(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(6))
        + b"Q"
    ),
    "storage of no class": state_dict(w=tensor(storage(kind=ORDERED_DICT))),
    "storage with a number as key": state_dict(w=tensor(storage(key=number(0)))),
    "storage out of the folder": state_dict(w=tensor(storage(key=text("../../etc/passwd")))),
    "storage that is the pickle": state_dict(w=tensor(storage(key=text("../data.pkl")))),
    "storage not there": state_dict(w=tensor(storage(key=text("7")))),
    "storage of fewer bytes": state_dict(w=tensor(storage(count=number(7)))),
    "storage of more bytes": state_dict(w=tensor(storage(kind=name("torch", "HalfStorage")))),
    "storage of -1": state_dict(w=tensor(storage(count=number(-1)))),
    "storage of True": state_dict(w=tensor(storage(count=b"\x88"))),
    "storage of 2**100": state_dict(w=tensor(storage(count=number(2**100)))),
    "negative offset": state_dict(w=tensor(storage(), number(-1))),
    "offset of one": state_dict(w=tensor(storage(), number(1))),
    "offset of 2**62": state_dict(w=tensor(storage(), number(2**62))),
    "negative size": state_dict(w=tensor(storage(), number(0), sizes(-2, -3))),
    "huge shape": state_dict(
        w=tensor(storage(), number(0), sizes(2**40, 2**40))
    ),
    "huge empty shape": state_dict(
        w=tensor(storage(), number(0), sizes(0, 2**40, 2**40), sizes(1, 1, 1))
    ),
    "one size more": state_dict(w=tensor(storage(), number(0), sizes(7), sizes(1))),
    "stride outside": state_dict(
        w=tensor(storage(), number(0), sizes(2, 3), sizes(4, 1))
    ),
    "stride of 0": state_dict(
        w=tensor(storage(), number(0), sizes(10**9), sizes(0))
    ),
    "negative stride": state_dict(
        w=tensor(storage(), number(5), sizes(6), sizes(-1))
    ),
    "stride of 2**62": state_dict(
        w=tensor(storage(), number(0), sizes(1), sizes(2**62))
    ),
    "fewer strides": state_dict(w=tensor(storage(), number(0), sizes(2, 3), sizes(1))),
    "shape as a list": state_dict(w=tensor(storage(), number(0), b"]")),
    "size as text": state_dict(w=tensor(storage(), number(0), tuple_of(text("2"), text("3")))),
    "rank 1000": state_dict(
        w=tensor(storage(), number(0), sizes(*[1] * 1000), sizes(*[1] * 1000))
    ),
    "tensor of no storage": state_dict(w=tensor(text("0"))),
    "tensor of a tensor": state_dict(w=tensor(tensor())),
    "tensor with hooks that call": state_dict(
        w=tensor(storage(), number(0), b")", b")", b"\x89", CALL + b"R")
    ),
    "tensor with fewer arguments": state_dict(w=name("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "conjugate view": state_dict(
        w=tensor(storage(), number(0), b")", b")", b"\x89", b"}", b"}" + text("conj") + b"\x88s")
    ),
    "parameter of nothing": state_dict(w=name("torch._utils", "_rebuild_parameter") + b")R"),
}  # fmt: skip


def refused(path: Path, pickled: bytes) -> XverseError:
    write_checkpoint(path, pickled, {"0": FLOATS.numpy().tobytes()})
    began = time.perf_counter()
    with pytest.raises(XverseError) as caught:
        PickleFile(path)
    assert time.perf_counter() - began < 2
    assert path.name in caught.value.what
    assert caught.value.why
    assert len(str(caught.value)) < 1500
    return caught.value


def test_the_fixture_itself_is_good(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.bin", GOOD, {"0": FLOATS.numpy().tobytes()})
    assert torch.equal(PickleFile(tmp_path / "a.bin").read("w"), FLOATS.reshape(2, 3))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("stacked", [False, True], ids=["GLOBAL", "STACK_GLOBAL"])
def test_no_call_is_made(tmp_path: Path, call: str, stacked: bool) -> None:
    canary = tmp_path / "canary"
    canary.write_text("alive")
    before = sorted(tmp_path.iterdir())
    module, _, attribute = call.rpartition(".")
    function = text(module) + text(attribute) + b"\x93" if stacked else name(module, attribute)
    payload = function + tuple_of(text(f"rm -f {canary}")) + b"R"
    error = refused(tmp_path / "evil.bin", state_dict(w=tensor(), x=payload))
    assert call in error.why
    assert "not allowed" in error.why
    (tmp_path / "evil.bin").unlink()
    assert sorted(tmp_path.iterdir()) == before
    assert canary.read_text() == "alive"


class _Runs:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_payload_that_fires_elsewhere_does_not_fire_here(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    payload = pickle.dumps({"w": _Runs(code)}, protocol=protocol)
    error = refused(tmp_path / "evil.bin", payload)
    assert "exec', which is not allowed" in error.why
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists()  # the canary works: Python's own unpickler ran the payload


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_malformed_streams_are_refused(tmp_path: Path, stream: bytes) -> None:
    refused(tmp_path / "evil.bin", stream)


def test_every_truncation_is_refused() -> None:
    for end in range(len(GOOD)):
        with pytest.raises(Malformed):
            read_pickle(GOOD[:end])


def test_mutations_are_read_or_refused(tmp_path: Path) -> None:
    """2,000 streams of one to three changed bytes: an answer or Malformed, and never more."""
    torch.save({"a": FLOATS, "b": [1, 2.5, None, {"c": (True, "d")}]}, tmp_path / "a.bin")
    real = PickleFile(tmp_path / "a.bin")._read_pickle_bytes()
    dice = random.Random(1)
    refusals = 0
    for _ in range(2000):
        stream = bytearray(dice.choice([GOOD, real]))
        for _ in range(dice.randint(1, 3)):
            stream[dice.randrange(len(stream))] = dice.randrange(256)
        try:
            read_pickle(bytes(stream))
        except Malformed:
            refusals += 1
    assert refusals > 1000


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(Malformed, match="more than 1000 steps"):
        read_pickle(program(b"]" + b"q\x00h\x00a" * 1000))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_equal_those_of_python(protocol: int) -> None:
    value = {
        "ints": [0, 255, 65_535, -1, 2**31 - 1, -(2**31), 2**40, -(2**63)],
        "floats": (0.5, -1e300),
        "words": ("", "权重", "a" * 300),
        "rest": [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {3: "x"}],
    }
    value["again"] = value["ints"]
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


def test_descriptors_say_where_a_tensor_lies() -> None:
    read = read_pickle(state_dict(w=tensor(storage(), number(1), sizes(5), sizes(1))))
    assert isinstance(read, dict)
    found = read["w"]
    assert isinstance(found, StoredTensor)
    assert (found.storage.key, found.storage.nbytes, found.nbytes) == ("0", 24, 20)
    assert (found.offset, found.shape, found.stride) == (1, (5,), (1,))
