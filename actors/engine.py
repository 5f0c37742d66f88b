"""vLLM's `AsyncLLM` behind the few calls that a generator needs: sample, score, swap the weights.

On a CPU the worker runs inside the engine's own process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): vLLM's default there is one
more process that spins on a second core, and for small models that core is worth more to the learner.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.engine_output import EngineOutput
from ftb_llm.config import Config
from ftb_llm.errors import EngineError, ProcessDied, RequestRefused, SetupError
from ftb_llm.types import Completion, FinishReason, SamplingSpec

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

WORKER_EXTENSION = "actors.merge.AdapterMerger"
SPARE_SEQUENCES = 8  # room for the canary while every group in flight is running
MOST_SEQUENCES = 1024
CPU_BATCHED_TOKENS = 8192
LIVENESS_SECONDS = 0.5
STOP_SECONDS = 15.0  # before the engine process is killed; on a busy machine its farewell takes some seconds

QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_HOST_IP": "127.0.0.1",
}


def engine_environment(config: Config, scratch: Path) -> dict[str, str]:
    """What vLLM reads from the environment of this process and of the engine process it starts."""
    environment = QUIET_AND_OFFLINE | {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_RPC_BASE_PATH": str(scratch),  # its sockets, which it leaves lying about
    }
    if config.actors.gpus_each == 0:
        environment |= {
            "OMP_NUM_THREADS": str(max(1, int(config.actors.cpus_each))),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines, or engine and learner, would be bound to the same core
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return environment


def engine_settings(config: Config, model_path: Path, *, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`.

    The engine is seeded, its requests are not: vLLM gives the k-th completion of a seeded request the seed plus k, so groups
    with neighbouring seeds would share their samples, and it samples seeded rows one by one.
    """
    actors = config.actors
    sequences = actors.groups_in_flight * config.sampling.group_size + SPARE_SEQUENCES
    settings: dict[str, Any] = {
        "model": str(model_path),
        "dtype": config.model.dtype,
        "max_model_len": actors.max_model_len,
        "max_num_seqs": min(sequences, MOST_SEQUENCES),
        "seed": seed,
        "logprobs_mode": "raw_logprobs",  # the model's own, whatever temperature and top_p the samples were drawn with
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if actors.gpus_each > 0:
        return settings | {"gpu_memory_utilization": actors.gpu_memory_utilization, "tensor_parallel_size": max(1, int(actors.gpus_each))}
    return settings | {
        "kv_cache_memory_bytes": int(actors.kv_cache_gib * 2**30),
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, actors.max_model_len),
        "enforce_eager": True,  # compiling takes 20 to 40 s at each start and gains nothing on small models
    }


def start_engine(config: Config, model_path: Path, *, seed: int, scratch: Path) -> "Engine":
    """Start the engine process, with its sockets in `scratch`; returns when the model is loaded. Call it inside the event loop that will use the engine."""
    if not (model_path / "config.json").is_file():
        raise SetupError(f"model.path: {model_path} has no config.json; it must be a local folder in Hugging Face format")
    os.environ.update(engine_environment(config, scratch))

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    wants_cpu = config.actors.gpus_each == 0
    if wants_cpu != current_platform.is_cpu():
        right = "0" if current_platform.is_cpu() else "above 0"
        build = f"a {current_platform.device_type} build of vLLM"
        raise SetupError(f"actors.gpus_each: {config.actors.gpus_each:g} does not go with {build}; it must be {right}")
    output = EngineOutput.begin()
    try:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_settings(config, model_path, seed=seed)))
    except Exception as error:  # noqa: BLE001 - whatever vLLM says, with its own type left behind
        raise EngineError(f"the engine did not start: {output.reason(error)}") from None
    return Engine(llm, model_path)


class Engine:
    """One running engine. Every failure of vLLM leaves here as an error of ours, so that callers need no vLLM to read it."""

    def __init__(self, llm: "AsyncLLM", model_path: Path) -> None:
        self._llm = llm
        self._model_path = model_path
        self._tokenizer: Any = llm.get_tokenizer()
        self._requests = 0
        self.vocabulary_size: int = llm.model_config.get_vocab_size()

    async def sample(self, prompt_ids: Sequence[int], spec: SamplingSpec, *, ignore_eos: bool = False) -> tuple[Completion, ...]:
        """Complete one prompt `group_size` times; requests of many calls are batched together as they come."""
        output = await self._run(
            prompt_ids,
            n=spec.group_size,
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=spec.max_tokens,
            ignore_eos=ignore_eos,
            logprobs=0,  # of the sampled token alone
        )
        outputs = sorted(output.outputs, key=lambda one: one.index)
        texts = self._tokenizer.batch_decode([list(one.token_ids) for one in outputs], skip_special_tokens=True)
        return tuple(_completion(one, text, spec.token_logprobs) for one, text in zip(outputs, texts, strict=True))

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
        """The log-prob of the completion, summed over its tokens."""
        output = await self._run([*prompt_ids, *completion_ids], temperature=0.0, max_tokens=1, prompt_logprobs=0)
        assert output.prompt_logprobs is not None
        scored = zip(output.prompt_logprobs[len(prompt_ids) :], completion_ids, strict=True)
        return sum(position[token].logprob for position, token in scored if position is not None)

    async def name_version(self, version: int) -> None:
        """Tokens sampled from now on are of this version."""
        await self._answered(self._llm.update_weight_version(str(version)))

    async def swap(self, adapter: Path, scale: float, version: int) -> float:
        """Pause, merge the adapter into the base weights, name the version, resume; returns the milliseconds of the pause."""
        paused = time.monotonic()
        await self._answered(self._llm.pause_generation(mode="keep", clear_cache=True))
        try:
            await self._answered(self._llm.collective_rpc("merge_adapter", args=(str(self._model_path), str(adapter), scale)))
            await self.name_version(version)
        finally:
            await self._answered(self._llm.resume_generation())
        return (time.monotonic() - paused) * 1e3

    async def stop(self) -> None:
        """End the engine process and wait until it is gone."""
        await asyncio.to_thread(self._llm.shutdown, STOP_SECONDS)

    async def _run(self, prompt_ids: Sequence[int], **params: Any) -> "RequestOutput":
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._requests += 1
        final = None
        try:
            # Text is decoded once at the end: doing it token by token costs a quarter of the speed on short completions.
            sampling = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **params)
            async for output in self._llm.generate(tokens_input(list(prompt_ids)), sampling, str(self._requests)):
                final = output
        except EngineDeadError:
            raise ProcessDied("the engine process died") from None
        except (EngineGenerateError, VLLMError, ValueError) as error:
            raise RequestRefused(f"the engine refused a request: {error.__cause__ or error}") from None
        assert final is not None
        assert final.finished
        return final

    async def _answered(self, call: Awaitable[T]) -> T:
        """Await a call to the engine process. vLLM leaves such a call unanswered for ever when the process dies under it."""
        task = asyncio.ensure_future(call)
        try:
            while not task.done():
                if self._llm.errored:
                    raise ProcessDied("the engine process died")
                await asyncio.wait([task], timeout=LIVENESS_SECONDS)
            return await task
        except ProcessDied:
            raise
        except Exception as error:  # noqa: BLE001 - whatever vLLM says, with its own type left behind
            if self._llm.errored:
                raise ProcessDied("the engine process died") from None
            raise EngineError(f"the engine failed: {error}") from None
        finally:
            task.cancel()


def _completion(output: "CompletionOutput", text: str, token_logprobs: bool) -> Completion:
    if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise EngineError(f"the engine ended a completion with {output.finish_reason!r} after {len(output.token_ids)} tokens")
    assert output.cumulative_logprob is not None
    assert output.weight_versions
    versions = [int(span.version) for span in output.weight_versions]
    return Completion(
        token_ids=tuple(output.token_ids),
        text=text,
        finish_reason=FinishReason(output.finish_reason),
        logprob=output.cumulative_logprob,
        min_version=min(versions),
        max_version=max(versions),
        token_logprobs=_token_logprobs(output) if token_logprobs else None,
    )


def _token_logprobs(output: "CompletionOutput") -> tuple[float, ...]:
    """Of the sampled tokens alone, in their order."""
    assert output.logprobs is not None
    return tuple(position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True))
