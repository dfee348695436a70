"""Report: what of a model runs in kernels, what does not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from hfopt import generation
from hfopt.errors import InvalidInput
from hfopt.host import Adapter, adapters_in
from hfopt.machine import env
from hfopt.machine.cores import Cores, cores_of_process
from hfopt.streaming import DiskUse, disk_use
from hfopt.words import counted, dtype_name, grouped, table

if TYPE_CHECKING:
    from hfopt.functional.choice import Choice
    from hfopt.patches.packing import Quantized
    from hfopt.patches.walk import Kept, Swapped, Walk
    from hfopt.program.listing import Listing

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Report:
    """What `optimize` has done to a model, and on what machine.

    memory_before, memory_after: resident memory of the process around `optimize`, in bytes. is_applied: False
    for what `optimize` would do. by_module: why decode steps go module by module; None if one is a single call, of the
    instructions in program.
    loops: modes of `generate` that are left to transformers' own loops and caches, and what differed. idle: swapped modules
    that cannot run in kernels as they are now, and why. cores: that threads fit in. kernels: the argument of `optimize`.
    window: tokens of the shortest window of a layer, if texts may be longer. choices: what "auto" takes for this
    model's dtypes. kv_cache: the argument of `optimize`; float_cache: why keys and values are cached as floats all the
    same, or None. speculation: the argument of `optimize`. keeps_prompts: whether there is a `prefix_cache`; rereads: why it
    is of no use with this model, or None. quantized: Linears with packed weights. left: those that `quantization` left as
    they are, and why. adapters: of LoRA, around Linears. together: in words, what processes share of the work; None for one
    that works alone. disk: what steps read from there, or None. advice: in words, which dtype would be faster, and at what
    cost; or None.

    Example:
        >>> import hfopt
        >>> report = hfopt.load(hfopt.embedded_model()).hfopt
        >>> report.counts
        {'layer': 4, 'attention': 4, 'mlp': 4, 'norm': 9, 'linear': 1}
        >>> report.to_dict()["kept"][2]["reason"]
        'it matches no pattern'
    """

    model_class: str
    dtype: str
    is_applied: bool
    swapped: tuple[Swapped, ...]
    kept: tuple[Kept, ...]
    by_module: str | None
    program: Listing | None
    loops: dict[str, str]
    idle: dict[str, str]
    cpu_path: str
    threads: int
    cores: Cores
    threading_layer: str
    kernels: str
    choices: tuple[Choice, ...]
    kv_cache: str | None
    float_cache: str | None
    speculation: str | None
    keeps_prompts: bool
    rereads: str | None
    window: int | None
    quantized: tuple[Quantized, ...]
    left: dict[str, str]
    adapters: tuple[Adapter, ...]
    together: str | None
    disk: DiskUse | None
    advice: str | None
    memory_before: int
    memory_after: int

    @classmethod
    def of(
        cls, walk: Walk, *, is_applied: bool, memory_before: int, left: Mapping[str, str] = NOTHING
    ) -> Report:
        """The report of a pass over a model that has just ended."""
        from hfopt.functional import choice  # here, because `import hfopt` must not load Numba
        from hfopt.patches.packing import quantized

        by_module, program = _steps(walk.model)
        generator = generation.generator_of(walk.model)
        state = generation.NOTHING if generator is None else generation.installed(generator)
        kv_cache, keeps_prompts = state.kv_cache, state.prefix_cache is not None
        dtypes = Counter(dtype_name(weight.dtype) for weight in walk.model.parameters())
        return cls(
            model_class=type(walk.model).__qualname__,
            dtype=", ".join(sorted(dtypes)) or "no parameters",
            is_applied=is_applied,
            swapped=tuple(walk.swapped()),
            kept=tuple(walk.kept()),
            by_module=by_module,
            program=program,
            loops={} if generator is None else dict(generation.refusals()),
            idle=walk.idle(),
            cpu_path=env.cpu_path(),
            threads=env.threads(),
            cores=cores_of_process(),
            threading_layer=env.threading_layer(),
            kernels=walk.kernels() if is_applied else "auto",
            kv_cache=kv_cache,
            float_cache=None if kv_cache is None else generation.cache_obstacle(generator),
            speculation=None if state.lookup is None else "lookup",
            keeps_prompts=keeps_prompts,
            rereads=generation.prefix_obstacle(generator) if keeps_prompts else None,
            window=None if generator is None else generation.window_of(generator),
            quantized=quantized(walk.model),
            left=dict(left),
            adapters=adapters_in(walk.model),
            together=_together(state),
            disk=disk_use(walk.model),
            advice=_advice(dtypes),
            choices=tuple(each for each in choice.choices() if each.dtype in dtypes),
            memory_before=memory_before,
            memory_after=env.resident_memory(),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of swapped modules by kind."""
        return dict(Counter(module.kind for module in self.swapped))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items()) or "nothing"
        verb = "swapped" if self.is_applied else "not optimized; optimize() would swap"
        grown = (self.memory_after - self.memory_before) / 2**20
        lines = [
            f"{self.model_class}: {verb} {counts}",
            f"{self.dtype}; {self.cpu_path}; {counted(self.threads, 'thread')}, {self.threading_layer};"
            f" {self.cores};"
            f" kernels {self.kernels or 'unused'};"
            f" memory {self.memory_before / 2**20:,.0f} MiB before, {grown:+,.1f} MiB after",
        ]
        step = "is one call" if self.by_module is None else f"goes module by module: {self.by_module}"
        adapters = f"; LoRA adapters: {', '.join(map(str, self.adapters))}" if self.adapters else ""
        lines.append(f"a decode step {step}{adapters}")
        if self.together is not None:
            lines.append(self.together)
        if self.disk is not None:
            lines.append(str(self.disk))
        if self.advice is not None:
            lines.append(self.advice)
        if self.loops:
            lines.append(str(generation.in_words(self.loops)))
        if self.kv_cache is not None:
            stored = (
                f"not as {self.kv_cache}: {self.float_cache}" if self.float_cache else f"as {self.kv_cache}"
            )
            lines.append(f"keys and values are cached {stored}")
        if self.speculation is not None:
            guessed = "not guessed: steps go module by module" if self.by_module else "guessed from the text"
            lines.append(f"next tokens are {guessed}")
        if self.keeps_prompts:
            lines.append(
                "beginnings of prompts are not read again"
                if self.rereads is None
                else f"prompts are read from their beginning: {self.rereads}"
            )
        if self.window is not None:
            lines.append(f"layers of a window of {self.window:,} tokens cache little more than those")
        if self.swapped:
            lines += ["", *table(("swapped", "from", "to", "probe differs by"), self._swapped_rows())]
        if self.quantized:
            saved = sum(module.saved_bytes for module in self.quantized) / 2**20
            lines += [
                "",
                *table(("quantised", "format", "MiB each", "MiB saved each"), self._quantized_rows()),
            ]
            lines.append(f"{saved:,.1f} MiB saved in all")
            lines += [
                f"{each.path} has packed weights beside those of {each.tied_to}, which it is tied to:"
                f" {each.n_bytes / 2**20:,.1f} MiB more"
                for each in self.quantized
                if each.tied_to is not None
            ]
        if self.left:
            lines += [
                "",
                *table(("not quantised", "reason"), grouped((p, (r,)) for p, r in self.left.items())),
            ]
        if self.idle:
            lines += [
                "",
                *table(
                    ("swapped, but not in use now", "reason"),
                    grouped((p, (r,)) for p, r in self.idle.items()),
                ),
            ]
        if self.kept:
            rows = grouped((module.path, (_short(module.old_class), module.reason)) for module in self.kept)
            lines += ["", *table(("kept", "class", "reason"), rows)]
        if "auto" in self.kernels:
            head = (f"auto with {counted(self.threads, 'thread')}", "kernels", "torch's time / hfopt's")
            lines += ["", *table(head, self._choice_rows())]
        return "\n".join(lines)

    def _choice_rows(self) -> list[tuple[str, ...]]:
        needed = [each for each in self.choices if each.kernels is not None]
        rows: list[tuple[str, ...]] = [(each.label, *each.outcome) for each in needed]
        if len(needed) < len(self.choices):
            rows.append(("other sizes" if needed else "all sizes", "not needed yet", ""))
        return rows

    def _quantized_rows(self) -> list[tuple[str, ...]]:
        return grouped(
            (each.path, (each.format, f"{each.n_bytes / 2**20:,.1f}", f"{each.saved_bytes / 2**20:,.1f}"))
            for each in self.quantized
        )

    def _swapped_rows(self) -> list[tuple[str, ...]]:
        worst: dict[tuple[str, str], float] = {}
        for module in self.swapped:
            key = (module.old_class, module.new_class)
            worst[key] = max(worst.get(key, 0.0), module.proof or 0.0)
        return grouped(
            (
                module.path,
                (
                    _short(module.old_class),
                    _short(module.new_class),
                    f"{worst[module.old_class, module.new_class]:.1e}",
                ),
            )
            for module in self.swapped
        )


def explain(model: nn.Module) -> Report:
    """Report what of a model runs in kernels, what does not and why; before `optimize`, what would.

    Raises InvalidInput for anything but a module, and what `optimize` raises.

    Example:
        >>> import hfopt
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(hfopt.embedded_model())
        >>> print(hfopt.explain(model))
        LlamaForCausalLM: not optimized; optimize() would swap 4 layer, 4 attention, 4 mlp, 9 norm, 1 linear
        ...
    """
    from hfopt.model_proof import verdict_on
    from hfopt.patches.walk import Walk

    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    memory = env.resident_memory()
    walk = Walk(model)
    # the model may have been wrapped since, by an adapter say
    reports = (module.__dict__.get("hfopt") for module in model.modules())
    done = next((report for report in reports if isinstance(report, Report)), None)
    if done is None:
        generator = generation.generator_of(model)
        walk.apply()
        try:
            if generator is not None:
                generation.keep(generator, generation.Installed(verdict=verdict_on(walk, generator)))
            return Report.of(walk, is_applied=False, memory_before=memory)
        finally:
            walk.undo()
            if generator is not None:
                generation.keep(generator, generation.NOTHING)
    now = Report.of(walk, is_applied=True, memory_before=done.memory_before, left=done.left)
    reasons = {module.path: module.reason for module in done.kept}
    kept = tuple(replace(module, reason=reasons.get(module.path, module.reason)) for module in now.kept)
    return replace(now, kept=kept, memory_after=done.memory_after)


def _together(state: generation.Installed) -> str | None:
    if state.ranks is None:
        return None
    size = state.ranks.size
    if state.ring is None:
        return f"{size} processes have the model together: each has a part of every layer"
    if state.ring.refusal is not None:
        return f"each of {size} processes reads all prompts: {state.ring.refusal}"
    return f"{size} processes read prompts of {generation.LEAST_TOGETHER:,} tokens and more together"


def _advice(dtypes: Collection[str]) -> str | None:
    """What float16 costs on a CPU that multiplies bfloat16; None elsewhere."""
    if "float16" not in dtypes or not env.has_bfloat16_products():
        return None
    return (
        "with dtype=torch.bfloat16 prompts would be read faster, as this CPU has instructions for its products; numbers "
        "have 8 significant bits then, not the 11 of float16"
    )


def _steps(model: nn.Module) -> tuple[str | None, Listing | None]:
    """Reason in words why decode steps of a swapped model go module by module; or the program that they run."""
    from hfopt.program.programs import Programs

    generator = generation.generator_of(model)
    if generator is None:
        return "the model does not generate", None
    refusal = generation.installed(generator).verdict.refusal
    if refusal is not None:
        return refusal, None
    found = generation.installed(generator).programs
    programs = found if isinstance(found, Programs) else Programs("hfopt")
    reason, listing = programs.shown(generator)
    reason = reason or generation.obstacle(generator)
    return reason, listing if reason is None else None


def _short(class_name: str) -> str:
    return class_name.rpartition(".")[2]
