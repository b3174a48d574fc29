"""IDS -> PAGES. Who holds which page of KV memory, and which full pages several may share.

A tree holds full pages by their tokens: a page is found again by whoever, in the same namespace,
begins with the same tokens. Pages that nobody reads stay until memory is wanted; then the one
unread for longest goes, leaves before what they continue.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[str, tuple[int, ...]]  # namespace, and the tokens of one page


class Node:
    """One full page in the tree; `readers` counts the tables that lead through it."""

    __slots__ = ("children", "key", "page", "parent", "readers")

    def __init__(self, key: Key, page: int, parent: "Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[Key, Node] = {}
        self.readers = 0


@dataclass(eq=False)
class Table:
    """The pages of one sequence in order; the first `len(path)` of them stand in the tree.

    From place `stale` on, a copy of `pages` that the device holds is out of date.
    """

    namespace: str
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    stale: int = 0


class Pages:
    """`count` pages of `size` tokens each: free, held by one table, or in the tree.

    Without `share` the tree stays empty, and every table holds its pages alone.
    """

    def __init__(self, count: int, size: int, *, share: bool = True) -> None:
        assert count > 0, "a pool has pages"
        assert size > 0, "a page has room"
        self.count, self.size, self.share = count, size, share
        self._free = list(range(count - 1, -1, -1))  # popped from the end: low numbers first
        self._root = Node(("", ()), -1, None)
        # Nodes without readers. A node always stands behind its children here: tables are left
        # from the deepest node up, and a child's readers are readers of its parent.
        self._idle: OrderedDict[Node, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many pages could be had now, the idle ones of the tree included."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """How many pages that many tokens fill."""
        return -(-tokens // self.size)

    def open(
        self, namespace: str, ids: Sequence[int], reusable: int, spare: int = 0
    ) -> Table | None:
        """A table with room for all of `ids`, or None where memory is short.

        Of the first `reusable` tokens, whole pages already known are shared and not computed
        again. `spare` pages more must remain available.
        """
        table = Table(namespace)
        self._share(table, ids, min(reusable, len(ids)))
        missing = self.needed(len(ids)) - len(table.pages)
        if missing + spare > self.available:
            self.close(table)
            return None
        table.pages += [self._take() for _ in range(missing)]
        return table

    def extend(self, table: Table, tokens: int) -> bool:
        """Room in `table` for `tokens` in all; False, and nothing changed, if memory is short."""
        missing = self.needed(tokens) - len(table.pages)
        if missing > self.available:
            return False
        table.pages += [self._take() for _ in range(missing)]
        return True

    def free_up(self, count: int) -> None:
        """Have `count` pages free, as far as there are any that nobody reads."""
        while len(self._free) < count and self._idle:
            self._free.insert(0, self._evict())

    def settle(self, table: Table, ids: Sequence[int], held: int) -> None:
        """Put pages that are full by now, `held` tokens being computed, into the tree.

        Where the tree has the same tokens already, its page takes the place of the table's.
        """
        full = held // self.size if self.share else 0
        for place in range(len(table.path), full):
            parent = table.path[-1] if table.path else self._root
            key = self._key(table.namespace, ids, place)
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = Node(key, table.pages[place], parent)
            else:
                self._free.append(table.pages[place])
                table.pages[place] = node.page
                table.stale = min(table.stale, place)
            self._enter(table, node)

    def close(self, table: Table) -> None:
        """Give back everything that `table` holds."""
        self._free += reversed(table.pages[len(table.path) :])
        for node in reversed(table.path):
            node.readers -= 1
            if node.readers == 0:
                self._idle[node] = None
        table.pages, table.path = [], []

    def check(self, tables: Sequence[Table] = ()) -> None:
        """Assert that every page is in exactly one place; `tables` are all that are open."""
        nodes = [node for child in self._root.children.values() for node in _walk(child)]
        readers = dict.fromkeys(nodes, 0)
        private: list[int] = []
        for table in tables:
            private += table.pages[len(table.path) :]
            assert table.pages[: len(table.path)] == [node.page for node in table.path]
            for node in table.path:
                readers[node] += 1
        assert {node: node.readers for node in nodes} == readers, "readers are counted right"
        assert set(self._idle) == {node for node in nodes if not node.readers}
        places = [*self._free, *private, *(node.page for node in nodes)]
        assert sorted(places) == list(range(self.count)), "a page is lost or in two places"

    def _share(self, table: Table, ids: Sequence[int], reusable: int) -> None:
        node = self._root
        for place in range(reusable // self.size):
            child = node.children.get(self._key(table.namespace, ids, place))
            if child is None:
                return
            node = child
            table.pages.append(node.page)
            self._enter(table, node)

    def _enter(self, table: Table, node: Node) -> None:
        if node.readers == 0:
            self._idle.pop(node, None)
        node.readers += 1
        table.path.append(node)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _evict(self) -> int:
        """The page of the tree that was unread for longest."""
        node, _ = self._idle.popitem(last=False)
        assert not node.children, "leaves go first"
        assert node.parent is not None, "the root holds no page"
        del node.parent.children[node.key]
        return node.page

    def _key(self, namespace: str, ids: Sequence[int], place: int) -> Key:
        return namespace, tuple(ids[place * self.size : (place + 1) * self.size])


def _walk(node: Node) -> list[Node]:
    found, open_nodes = [], [node]
    while open_nodes:
        node = open_nodes.pop()
        found.append(node)
        open_nodes += node.children.values()
    return found
