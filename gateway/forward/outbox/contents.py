"""What counts in a spool: messages, their weight, each device's share of it, and dead letters."""

from collections import Counter
from collections.abc import Iterable, Sequence

from gateway.forward.message import Message
from gateway.forward.outbox.store import WEIGHT, DeadLetter, Device, Group, Summary, weigh

__all__ = ["Contents"]


class Contents:
    """Committed, or about to be, and not settled. At `weight_max`, or when a device has its share, there is no room."""

    def __init__(self, weight_max: int, device_weight_max: int) -> None:
        self._weight_max = weight_max
        self._device_weight_max = device_weight_max
        self._held: Counter[Device] = Counter()
        self._message_weight = 0
        self._dead_weight = 0
        self.messages = 0
        self.dead_letters = 0

    @property
    def weight(self) -> int:
        """Of the messages and the dead letters."""
        return self._message_weight + self._dead_weight

    def has_room(self, message: Message) -> bool:
        """Whether it may come in. One message of a device that has none always fits its share."""
        weight = len(message.payload) + WEIGHT
        held = self._held[message.realm, message.device]
        return self._message_weight + self._dead_weight + weight <= self._weight_max and (
            not held or held + weight <= self._device_weight_max
        )

    def add(self, message: Message) -> None:
        """One comes in."""
        weight = len(message.payload) + WEIGHT
        self._held[message.realm, message.device] += weight
        self._message_weight += weight
        self.messages += 1

    def add_group(self, group: Group) -> None:
        """So many come in, or are counted again."""
        self.messages += len(group.messages)
        self._message_weight += group.weight
        self._held.update(group.devices)

    def remove(self, group: Group) -> None:
        """These are settled, or were not taken."""
        self.messages -= len(group.messages)
        self._message_weight -= group.weight
        held = self._held
        for device, weight in group.devices.items():
            left = held[device] - weight
            if left > 0:
                held[device] = left
            else:
                del held[device]

    def add_dead(self, letters: Sequence[DeadLetter]) -> None:
        """These wait for an operator."""
        self.dead_letters += len(letters)
        self._dead_weight += sum(weigh(letter.message) for letter in letters)

    def remove_dead(self, letters: Sequence[DeadLetter]) -> None:
        """An operator has decided."""
        self.dead_letters -= len(letters)
        self._dead_weight -= sum(weigh(letter.message) for letter in letters)

    def reset(self, summary: Summary, groups: Iterable[Group] = (), messages: Iterable[Message] = ()) -> None:
        """What is in the file counts, and beside it what is in memory only."""
        self._held = Counter(summary.devices)
        self._message_weight = summary.devices.total()
        self.messages = summary.messages
        self._dead_weight = summary.dead_weight
        self.dead_letters = summary.dead_letters
        for group in groups:
            self.add_group(group)
        for message in messages:
            self.add(message)
