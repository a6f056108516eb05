"""What the processes of a run agree on: process 0's decisions, and whether all are the same."""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client has no public name

from mnist_jax.errors import UsageError

DECIDED_KEPT = 64  # process 0's last decisions; no process is so far behind
FOREVER_MS = 2**31 - 1  # a wait that is ended by `processes.Watch` where a process is lost
_TEAMS = itertools.count()  # in every process as many, and in the same order


def key_of(*words: Any) -> str:
    """The name of a text that the coordinator keeps for this project."""
    return "/".join(("mnist_jax", *map(str, words)))


class Team:
    """The processes of a run as one of them sees them; a lone process is a team of one.

    All must call `decide`, `broadcast` and `gather` equally often and in the same order.

    Attributes:
        index: this process's number, from 0.
        count: how many there are.
    """

    def __init__(self):
        self._number = next(_TEAMS)
        self.index, self.count = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client
        self._asked = 0

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which decides, writes and shows."""
        return self.index == 0

    def decide(self, value: Any) -> Any:
        """Process 0's value, in every process; what JSON can hold, up to some kilobytes."""
        if self.count == 1:
            return value
        key = self._next_key()
        if self.leads:
            self._client.key_value_set(key, json.dumps(value))
            self._client.key_value_delete(self._key("said", self._asked - DECIDED_KEPT))
            return value
        return self._wait_for(key)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by their numbers; as in `decide`."""
        if self.count == 1:
            return [value]
        key = self._next_key()
        self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        return [self._wait_for(f"{key}/{index}") for index in range(self.count)]

    def broadcast(self, arrays: Any, rest: Any) -> tuple[Any, Any]:
        """Process 0's arrays and what JSON can hold, of any size, in every process.

        Args:
            arrays: a tree of NumPy arrays; elsewhere of any of the same shapes and dtypes.
            rest: taken from process 0.
        """
        if self.count == 1:
            return arrays, rest
        from jax.experimental import multihost_utils

        text = np.frombuffer(json.dumps(rest).encode(), np.uint8)
        size = self.decide(len(text))
        text = text if self.leads else np.zeros(size, np.uint8)
        arrays, text = multihost_utils.broadcast_one_to_all((arrays, text))
        return arrays, json.loads(bytes(text))

    def ask_to_stop(self, signal: int | None) -> int | None:
        """Tells process 0 of a signal; in process 0, the signal that any has had."""
        if self.count == 1 or (signal is None and not self.leads):
            return signal
        if not self.leads:
            self._client.key_value_set(self._key("stop", self.index), str(signal), True)
            return signal
        asked = [int(text) for _, text in self._client.key_value_dir_get(self._key("stop"))]
        return signal if signal is not None else next(iter(asked), None)

    def check_same(self, facts: dict[str, Any]) -> None:
        """Refuses processes that would not compute the same.

        Raises:
            UsageError: names what differs, in every process.
        """
        everyones = self.gather(facts)
        for index, theirs in enumerate(everyones):
            if different := [
                f"{name} ({value!r}, in process 0 {everyones[0].get(name)!r})"
                for name, value in theirs.items()
                if value != everyones[0].get(name)
            ]:
                raise UsageError(
                    f"process {index} differs from process 0 in {', '.join(different)}; "
                    "start all with the same flags and the same installation"
                )

    def _next_key(self) -> str:
        self._asked += 1
        return self._key("said", self._asked)

    def _key(self, *words: Any) -> str:
        return key_of(self._number, *words)  # what was said in an earlier run is of no account

    def _wait_for(self, key: str) -> Any:
        return json.loads(self._client.blocking_key_value_get(key, FOREVER_MS))
