"""AsyncRolloutEngine: the engine behind an event loop, for servers.

One thread owns the engine. Coroutines hand it commands, which it carries out between two steps, so the engine itself
needs no locks. A bad request fails its own caller; a step that raises fails the requests that were running, and the
next ones are served. Requests that arrive while the engine is paused or asleep wait.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from verl_pte.engine.engine import RolloutEngine
from verl_pte.engine.request import RolloutOutput
from verl_pte.engine.sampling import SamplingParams


class AsyncRolloutEngine:
    """Awaitable front of a `RolloutEngine`, which nobody else may use meanwhile."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._results: dict[Any, Future[RolloutOutput]] = {}
        self._paused = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pte-rollout", daemon=True)
        self._thread.start()

    async def generate(self, request_id: Any, prompt: Sequence[int], sampling: SamplingParams) -> RolloutOutput:
        """The response to one prompt. Raises ValueError if it cannot be served; cancelling aborts the request."""
        result: Future[RolloutOutput] = Future()

        def add() -> None:
            self.engine.add_request(request_id, prompt, sampling)
            self._results[request_id] = result

        await self._call(add)
        try:
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            self._submit(lambda: self._resolve(self.engine.abort(request_id)))
            raise

    async def abort(self, request_id: Any = None) -> None:
        """Stop one request, or all with None; their callers get what was generated, with finish reason "abort"."""
        await self._call(lambda: self._resolve(self.engine.abort(request_id)))

    async def pause(self) -> None:
        """Stop stepping after the step under way; requests keep their rows."""
        await self._call(lambda: setattr(self, "_paused", True))

    async def resume(self) -> None:
        """Go on stepping."""
        await self._call(lambda: setattr(self, "_paused", False))

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """See `RolloutEngine.load_weights`."""
        return await self._call(lambda: self.engine.load_weights(weights))

    async def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        await self._call(self.engine.sleep)

    async def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        await self._call(self.engine.wake)

    def close(self) -> None:
        """End the thread after its current step; unfinished requests fail with RuntimeError."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
            self._thread.join()

    def _submit(self, work: Callable[[], Any]) -> Future:
        if self._closed:
            raise RuntimeError("the engine is closed")
        done: Future = Future()

        def command() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._commands.put(command)
        return done

    async def _call(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._submit(work))

    def _resolve(self, outputs: list[RolloutOutput]) -> None:
        for output in outputs:
            result = self._results.pop(output.request_id)
            if not result.cancelled():
                result.set_result(output)

    def _fail_all(self, error: BaseException) -> None:
        self.engine.abort(None)
        for result in self._results.values():
            if not result.cancelled():
                result.set_exception(error)
        self._results.clear()

    def _run(self) -> None:
        while True:
            idle = self._paused or self.engine.cache is None or not self.engine.has_unfinished
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                try:
                    self._resolve(self.engine.step())
                except Exception as error:
                    self._fail_all(error)
                continue
            if command is None:
                self._fail_all(RuntimeError("the engine was closed"))
                return
            command()
