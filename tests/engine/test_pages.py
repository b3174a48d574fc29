"""Pages: none is ever lost or in two places, and only the same caller's same tokens share one."""

import random

import pytest

from xverse.engine.pages import Pages, Table


def filled(pages: Pages, ids: list[int], namespace: str = "") -> Table:
    """A table over all of `ids`, computed and settled."""
    table = pages.open(namespace, ids, len(ids))
    assert table is not None
    pages.settle(table, ids, len(ids))
    return table


def test_full_pages_of_the_same_tokens_are_shared_and_no_others() -> None:
    pages = Pages(20, 4)
    first = filled(pages, list(range(10)))
    second = filled(pages, [*range(8), 99, 98])
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pages.available == 20 - 4
    other = filled(pages, [*range(4), 0, 0, 0, 0])
    assert other.pages[0] == first.pages[0]
    assert other.pages[1] != first.pages[1]
    pages.check([first, second, other])


def test_the_reusable_part_bounds_what_is_shared() -> None:
    pages = Pages(20, 4)
    filled(pages, list(range(8)))
    table = pages.open("", list(range(8)), 7)
    assert table is not None
    assert len(table.path) == 1  # the last token is left to compute


def test_namespaces_never_share() -> None:
    pages = Pages(40, 2)
    ids = list(range(12))
    tables = {name: filled(pages, ids, name) for name in ("", "alice", "bob")}
    for name, table in tables.items():
        again = pages.open(name, ids, len(ids))
        assert again is not None
        assert again.pages == table.pages
        pages.close(again)
    held = [page for table in tables.values() for page in table.pages]
    assert len(set(held)) == len(held) == 18


def test_pages_computed_twice_become_one() -> None:
    pages = Pages(10, 2)
    ids = [1, 2, 3, 4]
    first, second = pages.open("", ids, 3), pages.open("", ids, 3)
    assert first is not None
    assert second is not None
    assert not {*first.pages} & {*second.pages}
    for table in (first, second):
        pages.settle(table, ids, 4)
    assert first.pages == second.pages
    assert pages.available == 8
    pages.check([first, second])


def test_the_page_unread_for_longest_goes_first_and_leaves_before_stems() -> None:
    pages = Pages(6, 1)
    for ids in ([1, 2, 3], [7, 8, 9]):
        pages.close(filled(pages, ids))
    pages.close(filled(pages, [1, 2]))  # read again; its continuation 3 was not
    lost = pages.open("", [50], 0)
    assert lost is not None
    lengths = {}
    for ids in ([1, 2, 3], [7, 8, 9]):
        table = Table("")
        pages._share(table, ids, 3)
        lengths[ids[0]] = len(table.path)
        pages.close(table)
    assert lengths == {1: 2, 7: 3}


def test_short_memory_changes_nothing() -> None:
    pages = Pages(4, 2)
    table = filled(pages, [1, 2, 3, 4, 5])
    assert pages.open("", [1, 2, 3, 4, 9, 9, 9], 6) is None
    assert pages.open("", [8], 0, spare=1) is None
    assert pages.extend(table, 8)
    assert not pages.extend(table, 9)
    pages.check([table])
    pages.close(table)
    assert pages.available == 4


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_page_is_in_one_place(seed: int) -> None:
    chance = random.Random(seed)
    pages = Pages(chance.randint(1, 30), chance.randint(1, 4))
    tables: list[tuple[Table, list[int]]] = []
    for _ in range(300):
        if tables and chance.random() < 0.45:
            table, ids = tables[chance.randrange(len(tables))]
            if chance.random() < 0.6:
                pages.close(table)
                tables.remove((table, ids))
            elif pages.extend(table, len(ids) + 1):
                ids.append(chance.randrange(2))
                pages.settle(table, ids, len(ids))
        else:
            ids = [chance.randrange(2) for _ in range(chance.randint(1, 20))]
            opened = pages.open(chance.choice("ab"), ids, len(ids) - 1, chance.randint(0, 2))
            if opened is not None:
                pages.settle(opened, ids, chance.randint(len(opened.path) * pages.size, len(ids)))
                tables.append((opened, ids))
        pages.check([table for table, _ in tables])
    for table, _ in tables:
        pages.close(table)
    assert pages.available == pages.count


def test_without_sharing_nothing_is_found_again() -> None:
    pages = Pages(8, 4, share=False)
    first = pages.open("", range(8), 8)
    assert first is not None
    pages.settle(first, range(8), 8)
    second = pages.open("", range(8), 8)
    assert second is not None
    assert not second.path
    assert not {*first.pages} & {*second.pages}
    pages.check([first, second])
    for table in (first, second):
        pages.close(table)
    pages.check()
    assert pages.available == 8
