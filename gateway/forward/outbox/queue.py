"""What of a spool is in memory for the deliverer, in order and bounded.

`ready` holds the groups behind those that are out, without a gap. When it is full, what is committed next is not kept
(`is_behind`), and from then on groups come from the file until the reader has caught up.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from gateway.forward.delivery import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX
from gateway.forward.outbox.store import Group

__all__ = ["DeliveryQueue"]


class DeliveryQueue:
    """Groups on their way from the file to the backend."""

    def __init__(self, weight_max: int) -> None:
        self._weight_max = weight_max
        self._ready: deque[Group] = deque()
        self.ready_weight = 0
        """Of what can be taken, in the weights of OutboxLimits."""
        self._out: deque[Group] = deque()
        self.is_behind = False
        """Whether there is more in the file."""
        self.loaded_through = 0
        """Number of the last group that is, or was, in memory."""

    def __bool__(self) -> bool:
        """Whether a batch can be taken."""
        return bool(self._ready)

    def __iter__(self) -> Iterator[Group]:
        """All that is in memory, in order."""
        return itertools.chain(self._out, self._ready)

    @property
    def since(self) -> float | None:
        """Since when the first message waits, Unix seconds."""
        first = self._out or self._ready
        return first[0].since if first else None

    def arrive(self, group: Group) -> None:
        """A group is in the file: keep it, if there is room."""
        if not self.is_behind and self.ready_weight < self._weight_max:
            self.load([group])
        else:
            self.is_behind = True

    def load(self, groups: Sequence[Group]) -> None:
        """These were read behind what is in memory; none: nothing is there any more."""
        self._ready.extend(groups)
        self.ready_weight += sum(group.weight for group in groups)
        if groups:
            self.loaded_through = groups[-1].number
        else:
            self.is_behind = False

    def take(self) -> list[Group]:
        """The next groups, a batch full. They are out until they are settled."""
        groups = [self._ready.popleft()]
        messages, weight = len(groups[0].messages), groups[0].weight
        while self._ready:
            messages += len(self._ready[0].messages)
            weight += self._ready[0].weight
            if messages > BATCH_MESSAGES_MAX or weight > BATCH_BYTES_MAX:
                break
            groups.append(self._ready.popleft())
        self.ready_weight -= sum(group.weight for group in groups)
        self._out.extend(groups)
        return groups

    def settled(self, group: Group) -> None:
        """The first group that is out is done with."""
        first = self._out.popleft()
        assert first is group, "groups are settled in order"

    def give_back(self) -> None:
        """What is out will not be delivered by who took it: it is the next again."""
        while self._out:
            group = self._out.pop()
            self._ready.appendleft(group)
            self.ready_weight += group.weight
