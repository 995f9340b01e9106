"""AsyncRolloutEngine: the engine behind an event loop, for servers.

One thread owns the engine. Coroutines hand it commands, which it carries out between two steps, so the engine itself
needs no locks. A bad request fails its own caller. A step that raises fails the requests that were in the engine, and
later ones are served; if even clearing the engine raises (a lost device), the thread ends, and every call, waiting or
new, fails with the reason. Requests that arrive while the engine is paused or asleep wait.
"""

import asyncio
import contextlib
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
    """Awaitable front of a `RolloutEngine`, which nobody else may use meanwhile.

    Attributes:
        failure: what ended the thread, or None. Every call raises RuntimeError once it is set.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._results: dict[Any, Future[RolloutOutput]] = {}
        self._paused = False
        self._closed = False
        self._lock = threading.Lock()  # no command may be queued after the last one was looked at
        self._thread = threading.Thread(target=self._run, name="pte-rollout", daemon=True)
        self._thread.start()

    async def generate(self, request_id: Any, prompt: Sequence[int], sampling: SamplingParams) -> RolloutOutput:
        """The response to one prompt. Raises ValueError if it cannot be served; cancelling aborts the request."""
        result: Future[RolloutOutput] = Future()

        def add() -> None:
            self.engine.add_request(request_id, prompt, sampling)
            result.set_running_or_notify_cancel()  # from here on only the engine's thread ends it
            self._results[request_id] = result

        adding = self._submit(add)
        try:
            await asyncio.wrap_future(adding)
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # closed: nothing is left to abort
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
        with self._lock:
            closing = not self._closed
            self._closed = True
            self._commands.put(None)
        if closing:
            self._thread.join()

    # -- between the threads

    def _submit(self, work: Callable[[], Any]) -> Future:
        done: Future = Future()
        with self._lock:
            if self.failure is not None:
                raise RuntimeError(f"the rollout engine died: {self.failure!r}") from self.failure
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._commands.put((done, work))
        return done

    async def _call(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._submit(work))

    # -- in the engine's thread

    def _run(self) -> None:
        try:
            while self._serve():
                pass
            error: BaseException = RuntimeError("the engine was closed")
        except BaseException as died:
            error = died
            with self._lock:
                self.failure = died
        self._fail_requests(error)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(error)

    def _serve(self) -> bool:
        """Carry out one command or, if none waits, one step; False when closed."""
        idle = self._paused or self.engine.cache is None or not self.engine.has_unfinished
        try:
            command = self._commands.get(block=idle)
        except queue.Empty:
            try:
                self._resolve(self.engine.step())
            except Exception as error:
                self._fail_requests(error)
                self.engine.abort(None)
            return True
        if command is None:
            return False
        done, work = command
        if done.set_running_or_notify_cancel():  # its caller may have been cancelled meanwhile
            try:
                value = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(value)
        return True

    def _resolve(self, outputs: list[RolloutOutput]) -> None:
        for output in outputs:
            self._results.pop(output.request_id).set_result(output)

    def _fail_requests(self, error: BaseException) -> None:
        while self._results:
            self._results.popitem()[1].set_exception(error)
