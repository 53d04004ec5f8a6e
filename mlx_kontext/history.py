"""What the turns of a session add up to: the tree, the current node, the queue. Data only, no files and no MLX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .turns import Damaged, Node, Queued, Turn


class History:
    """Apply turns in the order of their numbers; a turn about a node that was lost changes nothing.

    Raises Damaged for a second picture of one number.

    Redo goes to where one came from: each node remembers the child on the path that was visited last.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.current: int | None = None
        self.queue: list[Queued] = []
        self._children: dict[int | None, list[int]] = {}
        self._visited: dict[int, int] = {}

    def apply(self, turn: Turn) -> None:
        values = turn.values
        if turn.node is not None:
            self._add(turn.node, values["item"], values["follow"])
        elif turn.kind in ("undo", "redo", "checkout"):
            if values["node"] in self.nodes:
                self._go(values["node"])
        elif turn.kind == "star":
            self._change(values["node"], lambda node: replace(node, starred=values["on"]))
        elif turn.kind == "note":
            self._change(values["node"], lambda node: replace(node, note=values["text"]))
        elif turn.kind == "queue":
            self.queue.append(Queued(turn.id, values["request"], values["parent"]))
        elif turn.kind == "unqueue":
            self.queue = [item for item in self.queue if item.id != values["item"]]
        elif turn.kind == "reorder":
            order = {item: place for place, item in enumerate(values["items"])}
            self.queue.sort(key=lambda item: order.get(item.id, len(order)))  # stable: those not named come last

    def children(self, node: int | None) -> tuple[int, ...]:
        """In the order they were made; of None: the roots."""
        return tuple(self._children.get(node, ()))

    def siblings(self, node: int) -> tuple[int, ...]:
        """All children of its parent, itself among them."""
        return self.children(self.nodes[node].parent)

    def next(self, node: int) -> int | None:
        """Where redo leads: the child visited last, else the newest."""
        children = self.children(node)
        return self._visited.get(node, children[-1]) if children else None

    def path(self, node: int) -> tuple[Node, ...]:
        """From the root to the node."""
        nodes = [self.nodes[node]]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(self.nodes[parent])
        return tuple(reversed(nodes))

    def _add(self, node: Node, item: int | None, follow: bool) -> None:
        if node.id in self.nodes:
            raise Damaged(f"it says it is picture {node.id}, which is turn {self.nodes[node.id].turn}")
        if node.parent not in self.nodes:  # None, or lost: then it is a root of its own
            node = replace(node, parent=None)
        self.nodes[node.id] = node
        self._children.setdefault(node.parent, []).append(node.id)
        if follow:
            self._go(node.id)
        self.queue = [left for queued in self.queue if (left := _left(queued, item, node)) is not None]

    def _go(self, node: int) -> None:
        if node == self.current:
            return
        step, came_from = self.nodes[node], self.current
        self.current = node
        while step.parent is not None:
            self._visited[step.parent] = step.id
            if step.parent == came_from:  # from there to the root all is in order
                return
            step = self.nodes[step.parent]

    def _change(self, node: int, change: Callable[[Node], Node]) -> None:
        if node in self.nodes:
            self.nodes[node] = change(self.nodes[node])


def _left(queued: Queued, item: int | None, node: Node) -> Queued | None:
    """What is left of a queued edit after a result: nothing, or its other seeds, which start from where this one did."""
    if queued.id != item:
        return queued
    seeds = queued.request.get("seed")
    seeds = [seed for seed in seeds if seed != node.seed] if isinstance(seeds, list) else []
    return replace(queued, request=queued.request | {"seed": seeds}, parent=node.parent) if seeds else None
