"""DEBIAN PACKAGES -> TEXT BY LANGUAGE. Manuals, handbooks and source code that anyone can fetch.

`python -m bench.real_text OUT --also FOLDER` downloads the packages named below with `apt-get
download`, takes the text out of their pages, and writes OUT/text/LANGUAGE.jsonl; texts of FOLDER,
jsonl with `text` and `lang`, come first. No language gets more than --most megabytes.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Family of packages -> the licence, which lets anyone copy, change and pass on what is in them, and
# their languages.
FAMILIES = {
    "libreoffice-help": ("MPL-2.0", "en-us de fr es it ja ko pt-br ru zh-cn zh-tw pl"),
    "manpages": ("GPL-3+", "de fr es it pl pt-br ru"),
    "kicad-doc": ("GPL-3+ or CC-BY-3.0", "ja ru zh"),
    "gimp-help": ("GFDL-1.2+", "ja ko zh-cn ru"),
    "debian-reference": ("GPL-2+", "de es fr it ja pt zh-cn"),
    "aptitude-doc": ("GPL-2+", "es fr it ja ru"),
}
PACKAGES = {
    **{
        f"{family}-{language}": licence
        for family, (licence, languages) in FAMILIES.items()
        for language in languages.split()
    },
    "manpages-ja": "of each program",
    "manpages-zh": "GFDL-1.2+",
    "manpages-dev": "of each page, most GPL-2+ and BSD",
    "gnome-user-docs": "CC-BY-SA-3.0",
    "mate-user-guide": "GFDL-1.1+",
    "debian-handbook": "GPL-2+ or CC-BY-SA-3.0",
    "installation-guide-amd64": "GPL-2",
    "linux-doc-6.1": "GPL-2",
    "perl-doc": "Artistic or GPL-1+",
    "postgresql-doc-15": "PostgreSQL",
    "python3.11-doc": "PSF-2",
    "python3-sympy": "BSD-3-clause",
    "python3-django": "BSD-3-clause",
    "rust-src": "MIT or Apache-2.0",
    "golang-1.19-src": "BSD-3-clause",
    "libboost1.74-dev": "BSL-1.0",
}
LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr", "es", "it", "pt", "pl", "ru")
CODE = {".py": "python", ".rs": "rust", ".go": "go", ".hpp": "c++"}
PAGES = re.compile(r"\.(html|page|docbook|xml)$")
PLAIN = re.compile(r"(/_sources/.*\.rst\.txt|\.pod)$")
MANUAL = re.compile(r"/man\d/[^/]+\.gz$")
IN_PATH = re.compile(
    r"/(?:help|man|html|translations|installation-guide-amd64)/([a-z]{2})(?=[_/-])"
)
BEHIND = re.compile(r"-([a-z]{2})(?:-[a-z]{2})?$")  # the language behind a package's name


class Document(NamedTuple):
    """A text, its language (of code: the programming language), and "code" or "text"."""

    text: str
    lang: str
    kind: str

    @property
    def order(self) -> str:
        """Where it stands among others: by its hash, the same everywhere."""
        return hashlib.sha1(self.text.encode()).hexdigest()


# Of HTML, Mallard and DocBook: what surrounds the text, tags that end a line, and all tags.
AROUND = re.compile(
    r"<!--.*?-->|<\?.*?\?>|<(script|style|head|nav|header|footer|form|info|sup)\b.*?</\1\s*>"
    r"|<(div|p) [^>]*(?:navheader|navfooter|sidebar|navigation|footer|toc)\b.*?</\2\s*>",
    re.DOTALL | re.IGNORECASE,
)
BLOCK = re.compile(
    r"</?(?:p|div|li|tr|h\d|d[td]|pre|title|para|item|section|table|[uo]l|br)\b[^>]*>",
    re.IGNORECASE,
)
TAG = re.compile(r"<[^>]*>")


def text_of(page: str) -> str:
    """The text of a page, a line for each block."""
    page = re.sub(r"\s+", " ", AROUND.sub("", page))
    lines = html.unescape(TAG.sub("", BLOCK.sub("\n", page))).split("\n")
    return "\n".join(line.strip() for line in lines if line.strip())


def manual(page: str) -> str:
    """The text of a manual page in roff: requests and fonts taken off."""
    page = html.unescape(page)
    lines = []
    for line in page.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".so", ".de", ".if", ".ie", ".ds", ".nr")):
            continue
        if match := re.match(r"\.\s*(\w+)\s*(.*)", line):
            line = match[2].strip('"') if match[1] in _SPOKEN else ""
        line = re.sub(r"\\f(\(..|\[.*?\]|.)|\\s[-+]?\d|\\[&/,|^]", "", line)
        line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
        if line.strip():
            lines.append(line)
    return "\n".join(lines)


# Requests whose arguments are text.
_SPOKEN = {"SH", "SS", "B", "I", "BR", "BI", "IB", "IR", "RB", "RI", "SM", "SB", "TP", "IP"}


def fetch(folder: Path) -> None:
    """The packages, as apt is configured here; those that are there already are not asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not any(folder.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=folder, check=True)


def documents(package: str, file: Path) -> Iterator[Document]:
    """What a package has of text in our languages."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as unpacked:
        assert unpacked.stdout is not None
        with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and (wanted := _wanted(package, member.name)):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield from _document(member.name, content.read(), *wanted)


def _wanted(package: str, path: str) -> tuple[str, str] | None:
    """Language and kind of a member; None: it is not read."""
    suffix = Path(path).suffix
    if package.startswith(("python3-", "rust-", "golang-", "libboost")):
        return (CODE[suffix], "code") if suffix in CODE else None
    sphinx = package.startswith(("linux-doc", "python3.11"))
    if not (PLAIN.search(path) or MANUAL.search(path) or (PAGES.search(path) and not sphinx)):
        return None
    found = IN_PATH.search(path) or BEHIND.search(package)
    language = found[1] if found else "en"
    return (language, "text") if language in LANGUAGES else None


def _document(path: str, content: bytes, language: str, kind: str) -> Iterator[Document]:
    try:
        text = (gzip.decompress(content) if path.endswith(".gz") else content).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile):
        return  # a few manual pages are in older encodings
    if PAGES.search(path):
        text = text_of(text)
    elif MANUAL.search(path):
        text = manual(text)
    if len(text) >= 200:
        yield Document(text, language, kind)


def given(folders: Iterable[Path]) -> Iterator[Document]:
    """The texts of other folders; those without a language are left out."""
    for file in sorted(file for folder in folders for file in folder.glob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            code = file.name.startswith("code")
            if language := row.get("lang"):
                yield Document(row["text"], language, "code" if code else "text")


def write(folder: Path, found: list[Document], first: list[Document], most: int) -> None:
    """A file for each language; what is too much is left out by hash, never of `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    by_language: dict[str, list[Document]] = defaultdict(list)
    for document in [*first, *sorted(set(found), key=lambda document: document.order)]:
        by_language[document.lang].append(document)
    for language, those in sorted(by_language.items()):
        size = count = 0
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for document in those:
                if size < most:
                    file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
                    size, count = size + len(document.text.encode()), count + 1
        print(f"{language:<8} {count:>7,} of {len(those):>7,} documents {size / 1e6:8.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="folders of jsonl")
    parser.add_argument("--most", type=float, default=20, help="megabytes of a language")
    args = parser.parse_args()
    fetch(args.out / "debs")
    found: list[Document] = []
    for package in PACKAGES:
        (file,) = (args.out / "debs").glob(f"{package}_*.deb")
        before = len(found)
        found += documents(package, file)
        print(f"{package}: {len(found) - before:,} documents", flush=True)
    write(args.out / "text", found, list(given(args.also)), round(args.most * 1e6))


if __name__ == "__main__":
    main()
