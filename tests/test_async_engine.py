"""The async front: concurrency, failures that stay with their caller, pause, sleep, abort, close."""

import asyncio
import time

import pytest
from tiny import random_tokens, tiny_pte

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.core.reference import Oracle
from verl_pte.engine import AsyncRolloutEngine

GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture
def front():
    engine = RolloutEngine(tiny_pte("qwen2", 8), max_num_seqs=2, max_prompt_length=24, max_response_length=64)
    front = AsyncRolloutEngine(engine)
    yield front
    front.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_concurrent_requests_and_a_bad_one(front):
    async def main():
        prompts = random_tokens(9, 5, 12, 3)
        requests = [front.generate(i, p, GREEDY) for i, p in enumerate(prompts)]
        return prompts, await asyncio.gather(*requests, front.generate("bad", [], GREEDY), return_exceptions=True)

    prompts, (*outputs, bad) = run(main())
    assert [o.token_ids for o in outputs] == [Oracle(front.engine.model).greedy(p, 30)[0] for p in prompts]
    assert isinstance(bad, ValueError) and "prompt of 0 tokens" in str(bad)


def test_a_step_that_raises_fails_the_running_requests_only(front):
    async def main():
        step, calls = front.engine.step, []

        def failing():
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("broken step")
            return step()

        front.engine.step = failing
        first = await asyncio.gather(
            *(front.generate(i, p, GREEDY) for i, p in enumerate(random_tokens(9, 5))), return_exceptions=True
        )
        return first, await front.generate("next", random_tokens(9)[0], GREEDY)

    first, after = run(main())
    assert [str(e) for e in first] == ["broken step"] * 2
    assert after.token_ids == Oracle(front.engine.model).greedy(random_tokens(9)[0], 30)[0]


def test_requests_wait_while_paused_or_asleep(front):
    async def main():
        for stop, go in ((front.pause, front.resume), (front.sleep, front.wake)):
            await stop()
            request = asyncio.create_task(front.generate(0, random_tokens(9)[0], GREEDY))
            done, _ = await asyncio.wait([request], timeout=0.3)
            assert not done
            await go()
            assert len((await request).token_ids) == 30

    run(main())


def test_abort_and_cancel(front):
    async def main():
        await front.pause()
        requests = [asyncio.create_task(front.generate(i, random_tokens(9)[0], GREEDY)) for i in range(3)]
        await asyncio.sleep(0.1)
        requests[0].cancel()
        await front.abort(1)
        await front.resume()
        outputs = await asyncio.gather(*requests, return_exceptions=True)
        assert isinstance(outputs[0], asyncio.CancelledError)
        assert (outputs[1].finish_reason, outputs[2].finish_reason) == ("abort", "length")
        await front.pause()
        last = asyncio.create_task(front.generate(3, random_tokens(9)[0], GREEDY))
        await asyncio.sleep(0.1)
        await front.abort()
        assert (await last).finish_reason == "abort" and not front.engine.has_unfinished

    run(main())


def test_cancelling_a_queued_request_leaves_the_others_alone(front):
    """The cancelled command waits behind a long step, the worst moment for it."""

    async def main():
        step = front.engine.step
        front.engine.step = lambda: (time.sleep(0.2), step())[1]
        kept = asyncio.create_task(
            front.generate("kept", random_tokens(9)[0], SamplingParams(temperature=0, max_tokens=4))
        )
        await asyncio.sleep(0.3)
        for i in range(5):
            queued = asyncio.create_task(front.generate(i, random_tokens(5)[0], GREEDY))
            await asyncio.sleep(0.01 * i)
            queued.cancel()
        assert (await kept).token_ids == Oracle(front.engine.model).greedy(random_tokens(9)[0], 4)[0]
        front.engine.step = step
        await front.abort("nobody")  # all cancellations have been carried out before this
        assert not front.engine.has_unfinished and front.failure is None

    run(main())


def test_a_lost_device_fails_every_call_with_the_reason(front):
    async def main():
        def lost(*args):
            time.sleep(0.2)
            raise RuntimeError("device lost")

        front.engine.step = front.engine.abort = lost
        running = asyncio.create_task(front.generate(0, random_tokens(9)[0], GREEDY))
        await asyncio.sleep(0.1)
        queued = asyncio.create_task(front.sleep())  # behind the failing step
        outcomes = await asyncio.gather(running, queued, return_exceptions=True)
        assert [str(e) for e in outcomes] == ["device lost"] * 2
        assert str(front.failure) == "device lost"
        with pytest.raises(RuntimeError, match="engine died.*device lost"):
            await front.generate(1, [1], GREEDY)

    run(main())


def test_close_fails_what_is_left(front):
    async def main():
        await front.pause()
        request = asyncio.create_task(front.generate(0, random_tokens(9)[0], GREEDY))
        await asyncio.sleep(0.1)
        front.close()
        with pytest.raises(RuntimeError, match="was closed"):
            await request
        with pytest.raises(RuntimeError, match="is closed"):
            await front.generate(1, [1], GREEDY)

    run(main())
