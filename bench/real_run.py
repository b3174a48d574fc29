"""A REAL RUN, FROM TEXT TO FIGURES. A model of about 100M, trained for 20 minutes on one GPU.

    python -m bench.real_text TEXTS                        fetch the text, once
    python -m bench.real_run prepare OUT --texts TEXTS/text
    python -m bench.real_run train OUT/real_run.tar.xz --folder RUN --seconds 570 --total 1230
    python -m bench.real_run train ... the same again: it goes on, and ends when --total is spent
    python -m bench.real_run peer OUT/real_run.tar.xz --folder RUN --steps 200
    python -m bench.real_run report --folder RUN
    python -m bench.real_run plot

The first call of `train` kills its run once, and each call stops it by SIGTERM. `--small` goes
through the same lines on a CPU in a minute and records nothing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xverse.files import read_json, write_json

RESULT, PEER = "real_run_h200", "real_run_peer_h200"
ROOT = Path(__file__).resolve().parents[1]

# Each command imports what it needs: the processes of `prepare` import this file again, and would
# each load PyTorch.


def prepare(args: argparse.Namespace) -> None:
    from bench import real_pack

    vocabulary = 1_000 if args.small else 32_000
    real_pack.make(args.out, args.texts, vocabulary=vocabulary, planned_tokens=args.planned)


def train(args: argparse.Namespace) -> None:
    from bench import real_pack, real_train

    shards = real_pack.unpacked(args.pack, args.folder) / real_pack.SHARDS
    ended = real_train.train(
        shards, args.folder, seconds=args.seconds, total=args.total, small=args.small
    )
    print(f"the run is {ended}", flush=True)


def report(args: argparse.Namespace) -> None:
    from bench import real_report

    found = real_report.report(args.folder, "cpu" if args.small else "auto")
    short = {key: value for key, value in found.items() if key not in ("loss", "data", "config")}
    short["validation"] = found["validation"][-1:]
    print(json.dumps(short, indent=1, ensure_ascii=False))
    _keep(args, RESULT, found)


def peer(args: argparse.Namespace) -> None:
    from bench import real_pack, real_peer, real_train

    shards = real_pack.unpacked(args.pack, args.folder) / real_pack.SHARDS
    size = real_train.scale(args.small)
    found = real_peer.compare(shards, size, steps=args.steps, small=args.small)
    print(json.dumps({key: value for key, value in found.items() if "losses" not in str(value)}))
    _keep(args, PEER, found)


def plot(args: argparse.Namespace) -> None:
    from bench import real_report

    file = args.figures or ROOT / "bench" / "results" / f"{RESULT}.json"
    facts: Any = read_json(file)
    real_report.plot(facts["figures"], args.to)
    print(args.to)


def _keep(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """In bench/results; of a rehearsal, in the folder of its run."""
    if args.small:
        write_json(args.folder / f"{name}.json", {"figures": found})
    else:
        from bench.record import record

        print(record(name, found, ("triton", "transformers")))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prepare": prepare,
    "train": train,
    "report": report,
    "peer": peer,
    "plot": plot,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--small", action="store_true", help="tiny, on a CPU")
        if name == "prepare":
            command.add_argument("out", type=Path)
            command.add_argument("--texts", type=Path, nargs="+", required=True)
            command.add_argument("--planned", type=int, default=750_000_000, help="tokens")
        if name in ("train", "peer"):
            command.add_argument("pack", type=Path)
        if name in ("train", "peer", "report"):
            command.add_argument("--folder", type=Path, default=Path("/tmp/run"))
        if name == "train":
            command.add_argument("--seconds", type=float, default=570, help="of this call")
            command.add_argument("--total", type=float, default=1140, help="seconds of all calls")
        if name == "peer":
            command.add_argument("--steps", type=int, default=300)
        if name == "plot":
            command.add_argument("--figures", type=Path, help="a JSON of `report`")
            default = ROOT / "docs" / "images" / "real_run.png"
            command.add_argument("--to", type=Path, default=default)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
