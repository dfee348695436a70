"""Releases of transformers that do not exist yet, each made from the installed one by a few edits of its sources.

A release is a folder to be put first on `sys.path`: links to the installed files, and files of its own where a variant has
changed something. So its sources can be read, its modules have paths, and nothing of it is patched while it runs.
"""

import ast
import importlib.util
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

GENERATION = "generation/utils.py"
CRITERIA = "generation/stopping_criteria.py"
CACHES = "cache_utils.py"
MASKS = "masking_utils.py"
OUTPUTS = "modeling_outputs.py"
LOOPS = ("GenerationMixin._sample", "GenerationMixin._beam_search")
LONG = 11  # positions: behind every prompt of the tests, and before the end of every request


class Family(NamedTuple):
    """The file of a family, and its classes from the inside out."""

    path: str
    attention: str
    layer: str
    decoder: str
    head: str


FAMILIES = (
    Family(
        "models/llama/modeling_llama.py",
        "LlamaAttention",
        "LlamaDecoderLayer",
        "LlamaModel",
        "LlamaForCausalLM",
    ),
    Family("models/gptj/modeling_gptj.py", "GPTJAttention", "GPTJBlock", "GPTJModel", "GPTJForCausalLM"),
    Family("models/opt/modeling_opt.py", "OPTAttention", "OPTDecoderLayer", "OPTDecoder", "OPTForCausalLM"),
)
LLAMA, GPTJ, OPT = FAMILIES


class Inapplicable(Exception):
    """The installed release has nothing that this variant could change; says what."""


# ---- editing -----------------------------------------------------------------------------------------------


class Source:
    """The text of one file. Every edit has to find what it is about: AssertionError otherwise."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    def replace(self, pattern: str, replacement: str, *, inside: str = "", count: int = 1) -> None:
        """Regular expression, lines by themselves; inside: a class or function. count: how often, 0 for any number."""
        begin, end = self._span(inside) if inside else (0, len(self.text))
        changed, n = re.subn(pattern, replacement, self.text[begin:end], flags=re.MULTILINE)
        where = f"{self.path}: {inside or 'everywhere'}"
        assert n == count or (n and not count), f"{where}: {n} matches of {pattern!r} instead of {count}"
        self.text = self.text[:begin] + changed + self.text[end:]

    def has(self, name: str) -> bool:
        """Whether there is a class, a function or a method of this dotted name."""
        return self._find(name) is not None

    def body(self, name: str) -> str:
        begin, end = self._span(name)
        return self.text[begin:end]

    def parameters(self, function: str, change: Callable[[ast.arguments], None]) -> None:
        """Let `change` edit the parameters of a function."""
        node = self._node(function)
        change(node.args)
        returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
        indent = " " * node.body[0].col_offset
        header = f"def {node.name}({ast.unparse(node.args)}){returns}:\n{indent}"
        begin = self._offset(node.lineno, node.col_offset)
        end = self._offset(node.body[0].lineno, node.body[0].col_offset)
        self.text = self.text[:begin] + header + self.text[end:]

    def call(self, function: str, callee: str, change: Callable[[ast.Call], None]) -> None:
        """Let `change` edit the only call of `callee` in a function."""
        calls = [
            node
            for node in ast.walk(self._node(function))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == callee
        ]
        assert len(calls) == 1, f"{self.path}: {function} calls {callee} {len(calls)} times"
        (node,) = calls
        end_line, end_column = node.end_lineno, node.end_col_offset
        assert end_line is not None and end_column is not None
        begin, end = self._offset(node.lineno, node.col_offset), self._offset(end_line, end_column)
        change(node)
        self.text = self.text[:begin] + ast.unparse(node) + self.text[end:]

    def begin(self, function: str, *lines: str) -> None:
        """Put lines before its first statement."""
        body = self._node(function).body
        first = body[1] if ast.get_docstring(self._node(function)) is not None else body[0]
        at = self._offset(first.lineno, 0)
        added = "".join(f"{' ' * first.col_offset}{line}\n" for line in lines)
        self.text = self.text[:at] + added + self.text[at:]

    def move_out(self, method: str, name: str) -> None:
        """Make a method a function of the module."""
        begin, end = self._span(method)
        function = textwrap.dedent(self.text[begin:end])
        self.text = f"{self.text[:begin].rstrip()}\n{self.text[end:]}\n\n{function}\n"
        self.replace(rf"^def {method.rpartition('.')[2]}\(", f"def {name}(")

    def _find(self, name: str) -> Any:
        scope: Any = ast.parse(self.text)
        for part in name.split("."):
            found = [each for each in scope.body if getattr(each, "name", None) == part]
            if not found:
                return None
            scope = found[-1]
        return scope

    def _node(self, name: str) -> Any:
        node = self._find(name)
        assert node is not None, f"{self.path} has no {name}"
        return node

    def _span(self, name: str) -> tuple[int, int]:
        """From the first decorator to the end of the last line."""
        node = self._node(name)
        first = min([node, *node.decorator_list], key=lambda each: each.lineno)
        return self._offset(first.lineno, 0), self._offset(node.end_lineno + 1, 0)

    def _offset(self, line: int, column: int) -> int:
        """Of a position in `ast`, whose columns count bytes."""
        lines = self.text.splitlines(keepends=True)
        if line > len(lines):
            return len(self.text)
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


class Release:
    """The sources of a release, to be edited and written."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("transformers")
        assert spec is not None and spec.origin is not None
        self._folder = Path(spec.origin).parent
        self._sources: dict[str, Source] = {}
        found = re.search(r'^__version__ = "(.*)"', self["__init__.py"].text, flags=re.MULTILINE)
        assert found is not None
        self.version = found[1]

    def __getitem__(self, path: str) -> Source:
        if path not in self._sources:
            self._sources[path] = Source(path, (self._folder / path).read_text())
        return self._sources[path]

    def __contains__(self, path: str) -> bool:
        return (self._folder / path).exists()

    def paths(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self._folder)) for path in self._folder.glob(pattern))

    def set_version(self, version: str) -> None:
        self["__init__.py"].replace(r'^__version__ = ".*"', f'__version__ = "{version}"')
        self.version = version

    def rename(self, names: list[str], new: str, paths: list[str]) -> None:
        """Words wherever they stand in these files, but not in the names of modules."""
        word = rf"(?<!functools\.)\b(?:{'|'.join(names)})\b"
        n_changes = 0
        for path in paths:
            assert not re.search(rf"\b{new}\b", self[path].text), f"{path} has a {new} already"
            lines = self[path].text.splitlines(keepends=True)
            for number, line in enumerate(lines):
                if not line.startswith(("from ", "import ")):
                    lines[number], n = re.subn(word, new, line)
                    n_changes += n
            self[path].text = "".join(lines)
        assert n_changes, f"{' or '.join(names)} stands in none of {', '.join(paths)}"

    def cache_names(self) -> list[str]:
        """What the three families call a cache among the arguments of their functions."""
        functions = (
            node
            for family in FAMILIES
            for node in ast.walk(ast.parse(self[family.path].text))
            if isinstance(node, ast.FunctionDef)
        )
        arguments = (each for node in functions for each in (*node.args.args, *node.args.kwonlyargs))
        names = {
            each.arg
            for each in arguments
            if each.annotation is not None and re.search(r"\bCache\b", ast.unparse(each.annotation))
        }
        assert names
        return sorted(names)

    def write(self, folder: Path) -> None:
        """`folder` becomes an entry for `sys.path`."""
        changed = {
            path: source.text
            for path, source in self._sources.items()
            if source.text != (self._folder / path).read_text()
        }
        for path, text in changed.items():
            compile(text, path, "exec")
        own = {"."} | {str(parent) for path in changed for parent in Path(path).parents}
        for path in own:
            self._link(self._folder / path, folder / "transformers" / path, own, changed)
        for path, text in changed.items():
            (folder / "transformers" / path).write_text(text)
        metadata = folder / f"transformers-{self.version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: transformers\nVersion: {self.version}\n"
        )

    def _link(self, source: Path, target: Path, own: set[str], changed: dict[str, str]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            path = str(entry.relative_to(self._folder))
            if path not in own and path not in changed and entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry)
        # compiled files one by one: those of changed sources must not be put among the installed ones
        compiled = target / "__pycache__"
        compiled.mkdir()
        for entry in (source / "__pycache__").glob("*.pyc"):
            name = entry.name.partition(".")[0] + ".py"
            if str((source / name).relative_to(self._folder)) not in changed:
                (compiled / entry.name).symlink_to(entry)


def _add(parameters: ast.arguments, name: str) -> None:
    """One more, None by default."""
    parameters.args.append(ast.arg(name))
    parameters.defaults.append(ast.Constant(None))


def _turn(parameters: ast.arguments, n_fixed: int) -> None:
    """All but the first in reverse order, with a default each."""
    names = [each.arg for each in parameters.args]
    known = dict(zip(names[::-1], parameters.defaults[::-1], strict=False))
    parameters.args[n_fixed:] = parameters.args[n_fixed:][::-1]
    parameters.defaults = [known.get(each.arg, ast.Constant(None)) for each in parameters.args[n_fixed:]]


def _giving(name: str, expression: str) -> Callable[[ast.Call], None]:
    """One more argument for a call."""

    def give(call: ast.Call) -> None:
        call.keywords.append(ast.keyword(name, ast.parse(expression, mode="eval").body))

    return give


# ---- variants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """edit: what is different. is_neutral: stock's results are those of the installed release. keeps_version: it calls
    itself what the installed release does, as a checkout of its sources may. since: the first release that has what it
    changes."""

    edit: Callable[[Release], None]
    is_neutral: bool
    is_slow: bool = False
    keeps_version: bool = False
    since: str = "4.57"


VARIANTS: dict[str, Variant] = {}


def variant(
    *, neutral: bool, slow: bool = False, keeps_version: bool = False, since: str = "4.57"
) -> Callable[[Callable[[Release], None]], Callable[[Release], None]]:
    def enter(edit: Callable[[Release], None]) -> Callable[[Release], None]:
        VARIANTS[edit.__name__] = Variant(edit, neutral, slow, keeps_version, since)
        return edit

    return enter


def make(name: str, folder: Path) -> None:
    """Write the release of this name into an empty folder; raises Inapplicable."""
    release, made = Release(), VARIANTS[name]
    major, minor, *_ = release.version.split(".")
    if Version(release.version) < Version(made.since):
        raise Inapplicable(f"it is older than {made.since}")
    made.edit(release)
    if not made.keeps_version:
        release.set_version(f"{major}.{int(minor) + 1}.0+{name.replace('_', '.')}")
    release.write(folder)


@variant(neutral=True)
def unchanged(release: Release) -> None:
    """Nothing but the version."""


# The cache


def _files_of_the_cache(release: Release) -> list[str]:
    core = ("modeling_layers.py", "modeling_utils.py", "utils/generic.py", "utils/auto_docstring.py")
    others = [*release.paths("pipelines/*.py"), *release.paths("distributed/*.py")]
    generation = [f"generation/{name}.py" for name in ("utils", "candidate_generator", "logits_process")]
    families = [family.path for family in FAMILIES]
    return [path for path in (MASKS, OUTPUTS, *core, *others, *generation, *families) if path in release]


@variant(neutral=True)
def cache_renamed(release: Release) -> None:
    """Once more. Where the release takes older names of arguments, it takes the last one too."""
    names, files = release.cache_names(), _files_of_the_cache(release)
    release.rename(names, "recollection", files)
    for path in files:
        for name in names:
            release[path].text = re.sub(
                r'^( *@deprecate_kwarg\()"\w+"(,[^)\n]*new_name="recollection"[^)\n]*\)\n)',
                rf'\g<0>\1"{name}"\2',
                release[path].text,
                flags=re.MULTILINE,
            )


@variant(neutral=True, slow=True)
def cache_untyped(release: Release) -> None:
    """Renamed, taken by no older name, and annotated as anything."""
    files = _files_of_the_cache(release)
    release.rename(release.cache_names(), "recollection", files)
    for path in files:
        alias = r"^ *@deprecate_kwarg\([^)]*recollection[^)]*\)\n"
        annotation = r'\brecollection: (?:"[^"]*"|\[.*\]|[\w. |])+?(?= = |,|\)|$)'
        text = re.sub(alias, "", release[path].text, flags=re.MULTILINE)
        release[path].text = re.sub(annotation, "recollection: object", text, flags=re.MULTILINE)
    for family in FAMILIES:
        release[family.path].replace(r"\brecollection: object\b", "recollection", count=0)


@variant(neutral=True)
def reorder_renamed(release: Release) -> None:
    """What beams do to a cache has another name."""
    release.rename(["reorder_cache"], "select_beams", [CACHES, GENERATION])


@variant(neutral=True, slow=True)
def length_renamed(release: Release) -> None:
    """What a cache says about its length has another name."""
    files = [*release.paths("*.py"), *release.paths("generation/*.py"), *(family.path for family in FAMILIES)]
    release.rename(["get_seq_length"], "n_tokens_held", files)


@variant(neutral=True, slow=True)
def cache_layer_renamed(release: Release) -> None:
    release.rename(["DynamicLayer"], "GrowingLayer", [CACHES, "__init__.py"])


@variant(neutral=True)
def cache_layer_constructed_otherwise(release: Release) -> None:
    """A layer has to be told what kind it is."""
    source = release[CACHES]
    if not re.search(r"_MAPPING\[layer_type\]\(\*\*layer_kwargs\)", source.body("DynamicCache")):
        raise Inapplicable("caches make their layers in another way")
    source.replace(
        r"^    is_sliding = False\n",
        "\\g<0>\n    def __init__(self, layer_type, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.layer_type = layer_type\n\n",
        inside="DynamicLayer",
    )
    source.replace(
        r"(?<=_MAPPING\[layer_type\]\()(?=\*\*layer_kwargs\))",
        "layer_type=layer_type, ",
        inside="DynamicCache",
    )
    source.replace(
        r"(?<=layer_class_to_replicate=)DynamicLayer",
        "lambda: DynamicLayer(layer_type='full_attention')",
        inside="DynamicCache",
    )
    source.replace(r"\bDynamicLayer\(\)", "DynamicLayer(layer_type='full_attention')", inside="DynamicCache")


@variant(neutral=True)
def cache_updated_otherwise(release: Release) -> None:
    """`update` gives one more value, and is told who asks."""
    source = release[CACHES]
    source.replace(
        r"layer_idx: int,",
        "layer_idx: int, module,",
        inside="Cache.update",
    )
    source.replace(r"return keys, values$", "return keys, values, keys.shape[-2]", inside="Cache.update")
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, self\.layer_idx",
            r"\1\2, \3, _ = \4.update(\2, \3, self.layer_idx, self",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=True, slow=True)
def cache_of_another_class(release: Release) -> None:
    """`generate` makes a subclass of what it made before."""
    release[CACHES].text += "\n\nclass GrowingCache(DynamicCache):\n    pass\n"
    source = release[GENERATION]
    source.replace(r"^from \.\.cache_utils import \(", "from ..cache_utils import GrowingCache\n\\g<0>")
    source.replace(
        r"= DynamicCache\(\*\*dynamic_cache_kwargs\)",
        "= GrowingCache(**dynamic_cache_kwargs)",
        inside="GenerationMixin._prepare_cache_for_generation",
        count=0,
    )


@variant(neutral=True, slow=True)
def cache_copied(release: Release) -> None:
    """Each call of a model gives a new cache, of the same layers."""
    for family in FAMILIES:
        function = f"{family.decoder}.forward"

        def copied(call: ast.Call) -> None:
            names = release.cache_names()
            (given,) = (each for each in call.keywords if each.arg in names)
            given.value = ast.parse(f"copy.copy({ast.unparse(given.value)})", mode="eval").body

        release[family.path].call(function, "BaseModelOutputWithPast", copied)
        release[family.path].begin(function, "import copy")


@variant(neutral=True)
def keys_stored_otherwise(release: Release) -> None:
    """Twice as large, and halved when they are read: to mix that with what others store is wrong."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, (self\.layer_idx[^()]*)\)$",
            r"\1\2, \3 = \4.update(2.0 * \2, \3, \5)\n\1\2 = 0.5 * \2",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=True, slow=True)
def layers_counted_from_one(release: Release) -> None:
    for family in FAMILIES:
        source = release[family.path]
        source.replace(
            r"self\.layer_idx = layer_idx$",
            "self.layer_idx = layer_idx + 1",
            inside=f"{family.attention}.__init__",
        )
        source.replace(
            r"(?<=, )self\.layer_idx\b", "self.layer_idx - 1", inside=f"{family.attention}.forward"
        )


# Preparation


@variant(neutral=True)
def prefill_gone(release: Release) -> None:
    """The loops read the prompt themselves."""
    source = release[GENERATION]
    if not source.has("GenerationMixin._prefill"):
        raise Inapplicable("it has no _prefill")
    source.move_out("GenerationMixin._prefill", "_read_prompt")
    source.replace(r"self\._prefill\(", "_read_prompt(self, ", count=2)


@variant(neutral=True, slow=True)
def prefill_called_otherwise(release: Release) -> None:
    source = release[GENERATION]
    if not source.has("GenerationMixin._prefill"):
        raise Inapplicable("it has no _prefill")

    def turn(parameters: ast.arguments) -> None:
        this, ids, settings, kwargs, first = parameters.args
        parameters.args, parameters.defaults = [this, kwargs], []
        parameters.kwonlyargs = [ids, settings, first]
        parameters.kw_defaults = [None, None, ast.Constant(True)]

    def reorder(call: ast.Call) -> None:
        ids, settings, kwargs = call.args
        call.args = [kwargs]
        call.keywords += [ast.keyword("input_ids", ids), ast.keyword("generation_config", settings)]

    source.parameters("GenerationMixin._prefill", turn)
    for loop in LOOPS:
        source.call(loop, "self._prefill", reorder)


@variant(neutral=True, slow=True)
def prepare_cache_renamed(release: Release) -> None:
    release.rename(["_prepare_cache_for_generation"], "_make_cache", [GENERATION])


@variant(neutral=True, slow=True)
def prepare_cache_called_otherwise(release: Release) -> None:
    """All arguments in another order."""

    def turn(parameters: ast.arguments) -> None:
        assert not parameters.defaults
        parameters.args[1:] = parameters.args[:0:-1]

    def reverse(call: ast.Call) -> None:
        assert not call.keywords
        call.args = call.args[::-1]

    source = release[GENERATION]
    source.parameters("GenerationMixin._prepare_cache_for_generation", turn)
    source.call("GenerationMixin.generate", "self._prepare_cache_for_generation", reverse)


@variant(neutral=True)
def prepare_cache_returns(release: Release) -> None:
    """It gives other arguments, and leaves those that it was given as they are."""
    source, method = release[GENERATION], "GenerationMixin._prepare_cache_for_generation"
    source.replace(r"^( +)return$", r"\1return model_kwargs", inside=method, count=0)
    source.replace(r"\Z", "        return model_kwargs\n", inside=method)
    source.begin(method, "model_kwargs = dict(model_kwargs)")
    source.replace(
        r"^( +)(self\._prepare_cache_for_generation\()",
        r"\1model_kwargs = \2",
        inside="GenerationMixin.generate",
    )


@variant(neutral=True, slow=True)
def custom_generate_renamed(release: Release) -> None:
    """The door through which a loop is handed to `generate` has another name."""
    release.rename(["custom_generate"], "generate_with", [GENERATION])


@variant(neutral=True, slow=True)
def loops_told_more(release: Release) -> None:
    """`generate` hands every loop one more argument."""
    source = release[GENERATION]
    source.call("GenerationMixin.generate", "decoding_method", _giving("prompt_length", "input_ids_length"))
    for loop in LOOPS:
        source.parameters(loop, lambda parameters: _add(parameters, "prompt_length"))


@variant(neutral=True)
def prompts_expanded_later(release: Release) -> None:
    """Loops read each prompt once, and repeat for beams and samples what came of it."""
    source = release[GENERATION]
    if not source.has("GenerationMixin._prefill"):
        raise Inapplicable("it has no _prefill")
    source.replace(
        r"expand_size=max\(generation_config\.num_beams, generation_config\.num_return_sequences\)",
        "expand_size=1",
        inside="GenerationMixin.generate",
    )
    for loop, outputs in zip(LOOPS, ("outputs", "model_outputs"), strict=True):
        read = "_read_prompts(self, input_ids, generation_config, model_kwargs)"
        source.begin(loop, f"prompt_outputs, input_ids, model_kwargs = {read}")
        source.replace(rf"\b{outputs} = self\._prefill\([^)]*\)", f"{outputs} = prompt_outputs", inside=loop)
    source.text += """

def _read_prompts(model, input_ids, generation_config, model_kwargs):
    outputs = model._prefill(
        input_ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    copies = max(generation_config.num_beams, generation_config.num_return_sequences)
    if copies == 1:
        return outputs, input_ids, model_kwargs
    input_ids, model_kwargs = model._expand_inputs_for_generation(
        input_ids=input_ids, expand_size=copies, **model_kwargs
    )
    for value in outputs.values():
        if isinstance(value, Cache):
            value.batch_repeat_interleave(copies)
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            outputs[name] = value.repeat_interleave(copies, dim=0)
        elif isinstance(value, tuple):
            outputs[name] = tuple(each.repeat_interleave(copies, dim=0) for each in value)
    return outputs, input_ids, model_kwargs
"""


@variant(neutral=True, slow=True)
def prompts_in_chunks(release: Release) -> None:
    """Of four tokens, unless the user says otherwise."""
    source, method = release[GENERATION], "GenerationMixin._prefill"
    if not source.has(method):
        raise Inapplicable("it has no _prefill")
    source.begin(
        method,
        "is_in_chunks = model_kwargs.get('inputs_embeds') is None and generation_config.use_cache is not False",
    )
    source.replace(
        r"if generation_config\.prefill_chunk_size is None:",
        "if generation_config.prefill_chunk_size is None and not is_in_chunks:",
        inside=method,
    )
    source.replace(
        r"chunk_size = generation_config\.prefill_chunk_size$",
        "chunk_size = generation_config.prefill_chunk_size or 4",
        inside=method,
    )


@variant(neutral=True, slow=True)
def generate_called_otherwise(release: Release) -> None:
    """Its named arguments come in another order, and its other ones under another name."""
    source, method = release[GENERATION], "GenerationMixin.generate"
    source.replace(r"\bkwargs\b", "others", inside=method, count=0)

    def turn(parameters: ast.arguments) -> None:
        first, second, *rest = parameters.args[1:]
        parameters.args[1:] = [first, *rest, second]

    source.parameters(method, turn)


@variant(neutral=True, slow=True)
def configuration_method_renamed(release: Release) -> None:
    release.rename(["_prepare_generation_config"], "_read_generation_config", [GENERATION])


@variant(neutral=True, slow=True)
def loops_renamed(release: Release) -> None:
    release.rename(["_sample"], "_decode_rows", [GENERATION])
    release.rename(["_beam_search"], "_decode_beams", [GENERATION])


@variant(neutral=True, slow=True)
def use_cache_not_told(release: Release) -> None:
    """Loops look into the configuration for that, and models into theirs."""
    source = release[GENERATION]
    source.replace(
        r'^ +model_kwargs\["use_cache"\] = generation_config\.use_cache$',
        "",
        inside="GenerationMixin.generate",
    )
    for loop in LOOPS:
        if 'model_kwargs["use_cache"]' in source.body(loop):
            source.replace(r'model_kwargs\["use_cache"\]', "generation_config.use_cache", inside=loop)


@variant(neutral=True, slow=True)
def special_tokens_renamed(release: Release) -> None:
    """The tensors that `generate` leaves in the configuration for its loops."""
    files = release.paths("generation/*.py")
    release.rename(["_eos_token_tensor"], "_ends", files)
    release.rename(["_pad_token_tensor"], "_filler", files)


@variant(neutral=True, slow=True)
def modes_renamed(release: Release) -> None:
    release.rename(["GREEDY_SEARCH"], "MOST_LIKELY", release.paths("generation/*.py"))
    release.rename(["BEAM_SAMPLE"], "BEAMS_AT_RANDOM", release.paths("generation/*.py"))


@variant(neutral=True, slow=True)
def result_class_renamed(release: Release) -> None:
    """What `generate` returns has classes of other names."""
    files = [GENERATION, "generation/__init__.py", "__init__.py"]
    release.rename(["GenerateDecoderOnlyOutput"], "TokensGenerated", files)
    release.rename(["GenerateBeamDecoderOnlyOutput"], "BeamsGenerated", files)


@variant(neutral=True, slow=True)
def logits_to_keep_renamed(release: Release) -> None:
    files = [GENERATION, "modeling_utils.py", *(family.path for family in FAMILIES)]
    release.rename(["logits_to_keep"], "n_last_logits", files)


@variant(neutral=True, slow=True)
def remote_code_renamed(release: Release) -> None:
    files = ["modeling_utils.py", "configuration_utils.py", "distributed/mixin.py", GENERATION]
    release.rename(["is_remote_code"], "is_code_of_others", [path for path in files if path in release])


@variant(neutral=True, slow=True)
def configuration_alias_gone(release: Release) -> None:
    """Of a class that was renamed a year ago."""
    source = release["configuration_utils.py"]
    alias = r"^PretrainedConfig = PreTrainedConfig$"
    if not re.search(alias, source.text, flags=re.MULTILINE):
        raise Inapplicable("it has one name for the class only")
    source.replace(alias, "")
    release["__init__.py"].replace(r', "PretrainedConfig"\]', "]")
    release["__init__.py"].replace(
        r"^ +from \.configuration_utils import PretrainedConfig as PretrainedConfig$", ""
    )
    for path in release.paths("**/*.py"):  # some of its own files are late
        if re.search(r"\bPretrainedConfig\b", release[path].text):
            release[path].replace(r"\bPretrainedConfig\b", "PreTrainedConfig", count=0)


@variant(neutral=True, slow=True)
def inference_mode(release: Release) -> None:
    """`generate` makes tensors that cannot be changed outside of it."""
    source = release[GENERATION]
    source.replace(r"@torch\.no_grad\(\)", "@torch.inference_mode()", inside="GenerationMixin.generate")


# What goes into the model at each step


def _change_logits(release: Release, family: Family, argument: str, expression: str) -> None:
    """By an argument of the model, if it is given."""
    source, function = release[family.path], f"{family.head}.forward"
    source.parameters(function, lambda parameters: _add(parameters, argument))
    source.replace(
        r"^( +)((?:lm_)?logits) = self\.lm_head\(.*$",
        rf"\g<0>\n\1\2 = \2 if {argument} is None else {expression}",
        inside=function,
    )


@variant(neutral=False, slow=True)
def steps_counted(release: Release) -> None:
    """`_update_model_kwargs_for_generation` counts them, and the model is told."""
    release[GENERATION].replace(
        r"^( +)return model_kwargs\n\Z",
        r"\1model_kwargs['n_steps'] = model_kwargs.get('n_steps', 0) + 1\n\g<0>",
        inside="GenerationMixin._update_model_kwargs_for_generation",
    )
    for family in FAMILIES:
        _change_logits(release, family, "n_steps", r"\2.roll(n_steps, dims=-1)")


def _count_tokens(release: Release, families: tuple[Family, ...]) -> None:
    source, method = release[GENERATION], "GenerationMixin.prepare_inputs_for_generation"
    source.begin(method, "n_tokens = input_ids.shape[1]")
    source.replace(
        r"^( +)return model_inputs$",
        r"\1if 'n_tokens' in inspect.signature(self.forward).parameters:"
        r"\n\1    model_inputs['n_tokens'] = n_tokens\n\g<0>",
        inside=method,
    )
    for family in families:
        _change_logits(release, family, "n_tokens", r"\2.roll(n_tokens, dims=-1)")


@variant(neutral=False, slow=True)
def tokens_counted(release: Release) -> None:
    """`prepare_inputs_for_generation` does it for the model."""
    _count_tokens(release, FAMILIES)


@variant(neutral=False)
def tokens_counted_for_opt(release: Release) -> None:
    """For one family only: what is right for a Llama proves nothing about the others."""
    _count_tokens(release, (OPT,))


@variant(neutral=False, slow=True)
def rows_described(release: Release) -> None:
    """An object that has something about each row goes into the model."""
    source = release[GENERATION]
    source.text += """

class Rows:
    def __init__(self, n_rows):
        self.factors = 1 + torch.arange(n_rows)[:, None, None] % 2
"""
    source.replace(
        r"^( +)return model_inputs$",
        r"\1model_inputs['rows'] = Rows(input_ids.shape[0])\n\g<0>",
        inside="GenerationMixin.prepare_inputs_for_generation",
    )
    for family in FAMILIES:
        _change_logits(release, family, "rows", r"\2 * rows.factors")


@variant(neutral=True, slow=True)
def positions_not_prepared(release: Release) -> None:
    """Each model finds them for itself, which comes to the same where only their differences count."""
    source = release[GENERATION]
    if not source.has("GenerationMixin._prepare_position_ids_for_generation"):
        raise Inapplicable("it does not prepare positions")
    source.replace(
        r"^ +model_kwargs\[\"position_ids\"\] = self\._prepare_position_ids_for_generation\(.*$",
        "            pass",
        inside="GenerationMixin.generate",
    )


# Loops


@variant(neutral=False)
def beam_ties(release: Release) -> None:
    """Of equal candidates the last comes first, and there is one more field in the result."""
    release[GENERATION].replace(
        r"^( +)topk_log_probs, topk_indices = torch\.topk\(accumulated_log_probs, k=beams_to_keep\)$",
        r"\1order = accumulated_log_probs.flip(-1).argsort(dim=-1, descending=True, stable=True)\n"
        r"\1topk_indices = accumulated_log_probs.shape[-1] - 1 - order[:, :beams_to_keep]\n"
        r"\1topk_log_probs = accumulated_log_probs.gather(-1, topk_indices)",
        inside="GenerationMixin._get_top_k_continuations",
    )
    beam_lengths(release)


@variant(neutral=True, slow=True)
def beam_lengths(release: Release) -> None:
    """One more field in the result."""
    source = release[GENERATION]
    source.replace(
        r"^    beam_indices: .*$",
        r"\g<0>\n    n_new_tokens: object = None",
        inside="GenerateBeamDecoderOnlyOutput",
    )
    source.call(
        "GenerationMixin._beam_search",
        "GenerateBeamDecoderOnlyOutput",
        _giving("n_new_tokens", "(beam_indices >= 0).sum(dim=1)"),
    )


@variant(neutral=False, slow=True)
def beam_scores(release: Release) -> None:
    """The penalty for length is that of Wu et al. 2016."""
    release[GENERATION].replace(
        r"\(\(cur_len \+ 1 - decoder_prompt_len\) \*\* length_penalty\)",
        "(((6 + cur_len - decoder_prompt_len) / 6) ** length_penalty)",
        inside="GenerationMixin._update_finished_beams",
    )


@variant(neutral=False, slow=True)
def beam_heuristic(release: Release) -> None:
    """Beams go on for longer where long texts may still win."""
    release[GENERATION].replace(
        r'if early_stopping == "never" and length_penalty > 0\.0:',
        "if length_penalty > 0.0:",
        inside="GenerationMixin._check_early_stop_heuristic",
    )


@variant(neutral=False, slow=True)
def beam_heuristic_of_never(release: Release) -> None:
    """The same for those that are never to stop early."""
    release[GENERATION].replace(
        r"best_hypothetical_length = max_length - decoder_prompt_len$",
        "best_hypothetical_length = 1",
        inside="GenerationMixin._check_early_stop_heuristic",
    )


@variant(neutral=True, slow=True)
def beam_indices_widened(release: Release) -> None:
    release[GENERATION].replace(r"torch\.int32", "torch.int64", inside="GenerationMixin._beam_search")


@variant(neutral=False, slow=True)
def beam_processors(release: Release) -> None:
    """They see logits in beam search too."""
    release[GENERATION].replace(
        r"^( +)log_probs = nn\.functional\.log_softmax\(logits, dim=-1\)\n"
        r" +log_probs = logits_processor\(flat_running_sequences, log_probs\)$",
        r"\1log_probs = nn.functional.log_softmax(logits_processor(flat_running_sequences, logits), dim=-1)",
        inside="GenerationMixin._beam_search",
    )


@variant(neutral=False, slow=True)
def sample_bias(release: Release) -> None:
    """A token that is always favoured."""
    release[GENERATION].replace(
        r"^( +)next_token_scores = logits_processor\(input_ids, next_token_logits\)$",
        r"\g<0>\n\1next_token_scores = next_token_scores + 5.0 * (torch.arange(next_token_scores.shape[-1]) == 9)",
        inside="GenerationMixin._sample",
    )


@variant(neutral=False, slow=True, keeps_version=True)
def sample_bias_unversioned(release: Release) -> None:
    """The same in a checkout that calls itself what the installed release does."""
    sample_bias(release)


@variant(neutral=False, slow=True)
def random_numbers(release: Release) -> None:
    """One more is taken before each draw."""
    source = release[GENERATION]
    for method in ("_sample", "_get_top_k_continuations"):
        source.replace(
            r"^( +)(\w+ = torch\.multinomial\()",
            r"\1torch.rand(())\n\1\2",
            inside=f"GenerationMixin.{method}",
        )


@variant(neutral=False, slow=True)
def filler(release: Release) -> None:
    """Behind its end a row repeats its last token."""
    release[GENERATION].replace(
        r"\+ pad_token_id \* \(1 - unfinished_sequences\)",
        "+ input_ids[:, -1] * (1 - unfinished_sequences)",
        inside="GenerationMixin._sample",
    )


@variant(neutral=False, slow=True)
def ends_with_a_second_end(release: Release) -> None:
    """One end token does not end a row."""
    source = release[CRITERIA]
    source.replace(
        r"^        return is_done\n\Z",
        "        ends = torch.isin(input_ids, self.eos_token_id.to(input_ids.device))\n"
        "        return is_done & (ends.sum(dim=1) > 1)\n",
        inside="EosTokenCriteria.__call__",
    )


@variant(neutral=False, keeps_version=True)
def ends_with_a_second_end_unversioned(release: Release) -> None:
    """The same in a checkout that calls itself what the installed release does."""
    ends_with_a_second_end(release)


@variant(neutral=False, slow=True)
def length_counted_otherwise(release: Release) -> None:
    """The longest text has one token less."""
    release[CRITERIA].replace(
        r"cur_len >= self\.max_length$", "cur_len >= self.max_length - 1", inside="MaxLengthCriteria.__call__"
    )


@variant(neutral=False, slow=True)
def streamed_as_columns(release: Release) -> None:
    """A streamer gets new tokens as [rows, 1]; what a row says is the same."""
    source = release[GENERATION]
    inside = "StopCheck" if source.has("StopCheck") else "GenerationMixin._sample"
    source.replace(r"\.put\((\w+)\.cpu\(\)\)", r".put(\1[:, None].cpu())", inside=inside)


# Outputs of the model


@variant(neutral=True, slow=True)
def logits_renamed(release: Release) -> None:
    release[OUTPUTS].replace(r"^    logits: ", "    next_scores: ", inside="CausalLMOutputWithPast")
    source = release[GENERATION]
    for loop, outputs in zip(LOOPS, ("outputs", "model_outputs"), strict=True):
        source.replace(rf"\b{outputs}\.logits\b", f"{outputs}.next_scores", inside=loop, count=0)

    def give(call: ast.Call) -> None:
        (logits,) = (each for each in call.keywords if each.arg == "logits")
        logits.arg = "next_scores"

    for family in FAMILIES:
        release[family.path].call(f"{family.head}.forward", "CausalLMOutputWithPast", give)


@variant(neutral=True, slow=True)
def outputs_are_no_dicts(release: Release) -> None:
    """They have a dict's methods, and are none."""
    source = release["utils/generic.py"]
    source.replace(r"^class ModelOutput\(OrderedDict\b", "class ModelOutput(_Fields")
    source.replace(
        r"^class ModelOutput\(",
        """
class _Fields:
    def _held(self):
        return self.__dict__.setdefault("_held_fields", {})

    def __init__(self, *args, **kwargs):
        self._held().update(*args, **kwargs)

    def __getitem__(self, name):
        return self._held()[name]

    def __setitem__(self, name, value):
        self._held()[name] = value

    def __delitem__(self, name):
        del self._held()[name]

    def __contains__(self, name):
        return name in self._held()

    def __iter__(self):
        return iter(self._held())

    def __len__(self):
        return len(self._held())

    def get(self, name, default=None):
        return self._held().get(name, default)

    def keys(self):
        return self._held().keys()

    def values(self):
        return self._held().values()

    def items(self):
        return self._held().items()


\\g<0>""".lstrip("\n"),
    )


@variant(neutral=True, slow=True)
def logits_of_one_token_flat(release: Release) -> None:
    """[rows, vocabulary] where there is one token a row."""
    source = release[GENERATION]
    for loop, outputs in zip(LOOPS, ("outputs", "model_outputs"), strict=True):
        source.replace(
            rf"\b{outputs}\.logits\[:, -1(, :)?\]",
            f"({outputs}.logits if {outputs}.logits.dim() == 2 else {outputs}.logits[:, -1])",
            inside=loop,
        )
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)((?:lm_)?logits) = self\.lm_head\(.*$",
            r"\g<0>\n\1\2 = \2[:, 0] if \2.shape[1] == 1 else \2",
            inside=f"{family.head}.forward",
        )


@variant(neutral=True, slow=True)
def collector_renamed(release: Release) -> None:
    """Of the outputs that are looked into."""
    if "utils/output_capturing.py" not in release:
        raise Inapplicable("outputs are captured in another way")
    release.rename(["_active_collector"], "_collected", ["utils/output_capturing.py"])


# Modules


def _names_of_calls(release: Release, family: Family) -> tuple[str, str]:
    """What a layer calls its attention, and the decoder a layer."""
    source = release[family.path]
    attention = re.search(r"self\.(?:self_)?attn(?=\()", source.body(f"{family.layer}.forward"))
    layer = re.search(r"\b(?:decoder_layer|block)(?=\()", source.body(f"{family.decoder}.forward"))
    assert attention is not None and layer is not None
    return attention[0], layer[0]


@variant(neutral=True, slow=True)
def attention_argument(release: Release) -> None:
    """One more that nobody gives."""
    for family in FAMILIES:
        function = f"{family.attention}.forward"
        release[family.path].parameters(function, lambda parameters: _add(parameters, "sink"))


def _give_gain(release: Release, value: str) -> None:
    """Attention, made stronger or weaker by an argument that comes from the decoder."""
    for family in FAMILIES:
        source = release[family.path]
        attention, layer, decoder = (f"{name}.forward" for name in family[1:4])
        for function in (attention, layer):
            source.parameters(function, lambda parameters: _add(parameters, "gain"))
        source.replace(
            r"^( +)return attn_output, attn_weights$",
            r"\1attn_output = attn_output if gain is None else attn_output * gain\n\g<0>",
            inside=attention,
        )
        calls = zip((layer, decoder), _names_of_calls(release, family), ("gain", value), strict=True)
        for function, callee, expression in calls:
            source.call(function, callee, _giving("gain", expression))


@variant(neutral=False, slow=True)
def attention_gain(release: Release) -> None:
    """One more argument that the decoder gives."""
    _give_gain(release, "0.5")


@variant(neutral=False)
def attention_gain_of_long_texts(release: Release) -> None:
    """It is given when a text has become long, which the first steps do not show."""
    _give_gain(release, f"0.5 if int(position_ids.max()) > {LONG} else None")


@variant(neutral=False, slow=True)
def attention_of_long_texts(release: Release) -> None:
    """Weaker when there are many keys, of which no argument says anything."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, [^()]*\)$",
            rf"\g<0>\n\1\3 = \3 * (0.5 if \2.shape[-2] > {LONG} else 1.0)",
            inside=f"{family.attention}.forward",
        )


def _scale_embeddings(release: Release, factor: str) -> None:
    for family in FAMILIES:
        release[family.path].replace(
            r"hidden_states = inputs_embeds\b",
            f"hidden_states = {factor} * inputs_embeds",
            inside=f"{family.decoder}.forward",
        )


@variant(neutral=False, slow=True)
def embeddings_scaled(release: Release) -> None:
    _scale_embeddings(release, "2.0")


@variant(neutral=False, slow=True)
def embeddings_scaled_in_long_texts(release: Release) -> None:
    _scale_embeddings(release, f"(2.0 if int(position_ids.max()) > {LONG} else 1.0)")


@variant(neutral=False, slow=True)
def layers_reversed(release: Release) -> None:
    """The last layer comes first."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +for .*\b(?:decoder_layer|block) in (?:enumerate\()?)(self\.\w+(?:\[.*\])?)(\)?:)$",
            r"\1list(\2)[::-1]\3",
            inside=f"{family.decoder}.forward",
        )


@variant(neutral=False, slow=True)
def norm_scaled(release: Release) -> None:
    release[LLAMA.path].replace(
        r"return self\.weight \* hidden_states",
        "return 2 * self.weight * hidden_states",
        inside="LlamaRMSNorm",
    )


@variant(neutral=True)
def arguments_reordered(release: Release) -> None:
    """Those of attention and of layers, which are called with names."""
    for family in FAMILIES:
        source = release[family.path]
        source.parameters(f"{family.attention}.forward", lambda parameters: _turn(parameters, 1))
        # decoders give the hidden states without a name
        source.parameters(f"{family.layer}.forward", lambda parameters: _turn(parameters, 2))


@variant(neutral=True, slow=True)
def attention_called_by_position(release: Release) -> None:
    """With its arguments in another order."""
    for family in FAMILIES:
        source = release[family.path]
        names: list[str] = []

        def give(call: ast.Call, names: list[str] = names) -> None:
            named = [each for each in call.keywords if each.arg is not None][::-1]
            names += [each.arg for each in named if each.arg is not None]
            call.args = [each.value for each in named]
            call.keywords = [each for each in call.keywords if each.arg is None]

        def take(parameters: ast.arguments, names: list[str] = names) -> None:
            others = [each.arg for each in parameters.args[1:] if each.arg not in names]
            parameters.args = [ast.arg("self"), *map(ast.arg, names + others)]
            parameters.defaults = [ast.Constant(None) for _ in names + others]

        source.call(f"{family.layer}.forward", _names_of_calls(release, family)[0], give)
        source.parameters(f"{family.attention}.forward", take)


@variant(neutral=True)
def attention_returns_more(release: Release) -> None:
    for family in FAMILIES:
        source = release[family.path]
        source.replace(
            r"return attn_output, attn_weights$",
            "return attn_output, attn_weights, None",
            inside=f"{family.attention}.forward",
        )
        source.replace(
            r"(\w+), (\w+) = (self\.(?:self_)?attn\()", r"\1, \2, _ = \3", inside=f"{family.layer}.forward"
        )


@variant(neutral=True, slow=True)
def attention_returns_a_tensor(release: Release) -> None:
    """And whoever wants weights gets none."""
    for family in FAMILIES:
        source = release[family.path]
        source.replace(
            r"return attn_output, attn_weights$", "return attn_output", inside=f"{family.attention}.forward"
        )
        source.replace(
            r"^( +)(\w+), (\w+) = (self\.(?:self_)?attn\()",
            r"\1\3 = None\n\1\2 = \4",
            inside=f"{family.layer}.forward",
        )


@variant(neutral=True, slow=True)
def layer_returns_a_tuple(release: Release) -> None:
    """Of what it returned before."""
    for family in FAMILIES:
        source = release[family.path]
        source.replace(r"^( +)return (.+)\n\Z", r"\1return ((\2),)\n", inside=f"{family.layer}.forward")
        source.replace(
            r"^( +)(\w+) = ((?:decoder_layer|block)\()", r"\1\2, = \3", inside=f"{family.decoder}.forward"
        )


@variant(neutral=True, slow=True)
def angles_swapped(release: Release) -> None:
    """The sine comes where the cosine was."""
    for family in (LLAMA, GPTJ):
        source = release[family.path]
        rotary = f"{family.attention.removesuffix('Attention')}RotaryEmbedding"
        if not source.has(rotary):  # then layers look angles up for themselves
            continue
        source.replace(r"^( +)return (.*), (.*)\n\Z", r"\1return \3, \2\n", inside=f"{rotary}.forward")
        source.replace(
            r"^( +)(\w+), (\w+) = position_embeddings$",
            r"\1\3, \2 = position_embeddings",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=True)
def mask_inverted(release: Release) -> None:
    """True says what is hidden."""
    release[MASKS].replace(
        r"^( +)return causal_mask\n\Z",
        r"\1is_bool = isinstance(causal_mask, torch.Tensor) and causal_mask.dtype == torch.bool\n"
        r"\1return ~causal_mask if is_bool else causal_mask\n",
        inside="create_causal_mask",
    )
    release["integrations/sdpa_attention.py"].begin(
        "sdpa_attention_forward",
        "if attention_mask is not None and attention_mask.dtype == torch.bool:",
        "    attention_mask = ~attention_mask",
    )


@variant(neutral=True, slow=True)
def scaling_renamed(release: Release) -> None:
    """An attribute of attention modules."""
    release[LLAMA.path].replace(r"\bself\.scaling\b", "self.softmax_scale", count=0)
    release[OPT.path].replace(r"\bself\.scaling\b", "self.softmax_scale", count=0)


# ---- what one layer, one prompt or one family shows and another does not ------------------------------------


@variant(neutral=False)
def attention_by_layer(release: Release) -> None:
    """Each layer spreads its attention more than the one before it: the first shows nothing of that."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, [^()]*\)$",
            r"\g<0>\n\1\2 = \2 / (self.layer_idx + 1)",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=False, slow=True)
def attention_of_long_prompts(release: Release) -> None:
    """Weaker for many tokens at once."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)return attn_output, attn_weights$",
            r"\1attn_output = attn_output * (0.5 if hidden_states.shape[1] > 8 else 1.0)\n\g<0>",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=False)
def attention_returns_values(release: Release) -> None:
    """Layers read them."""
    for family in FAMILIES:
        source = release[family.path]
        values = re.search(r"\w+, (\w+) = \w+\.update\(", source.body(f"{family.attention}.forward"))
        assert values is not None
        source.replace(
            r"return attn_output, attn_weights$",
            f"return attn_output, attn_weights, {values[1]}[:, :, -attn_output.shape[1] :]",
            inside=f"{family.attention}.forward",
        )
        source.replace(
            r"^( +)(\w+), (\w+) = (self\.(?:self_)?attn\([^()]*\))$",
            r"\1\2, \3, values = \4\n\1\2 = \2 + values.mean((1, 3))[..., None]",
            inside=f"{family.layer}.forward",
        )


@variant(neutral=True, slow=True)
def cache_counts(release: Release) -> None:
    """It keeps count of its tokens, and one family finds positions by that."""
    source = release[CACHES]
    source.begin("Cache.update", "if layer_idx == 0:", "    self.n_tokens += key_states.shape[-2]")
    source.replace(r"^class Cache:\n(?:    \"\"\"(?:.|\n)*?\"\"\"\n)?", "\\g<0>\n    n_tokens = 0\n", count=1)
    function = f"{OPT.decoder}.forward"
    release[OPT.path].replace(r"\b(\w+)\.get_seq_length\(\)", r"\1.n_tokens", inside=function)
    release[OPT.path].replace(r"if position_ids is None:", "if True:", inside=function)


@variant(neutral=True, since="5.23")
def rows_remembered(release: Release) -> None:
    """One family remembers of each row of a prompt where it begins, to find the positions behind it."""
    function = f"{OPT.decoder}.forward"
    release[OPT.path].replace(
        r"^( +)if position_ids is None:$",
        r"\1if past_seen_tokens == 0:"
        r"\n\1    self.begins = position_attention_mask.shape[1] - position_attention_mask.sum(1).long()[:, None]"
        r"\n\1elif inputs_embeds.shape[1] == 1:"
        r"\n\1    position_ids = past_seen_tokens - self.begins"
        r"\n\g<0>",
        inside=function,
    )


@variant(neutral=True, slow=True, since="5.23")
def rows_remembered_in_the_cache(release: Release) -> None:
    """The same, beside the keys."""
    rows_remembered(release)
    (name,) = {
        each for each in release.cache_names() if each in release[OPT.path].body(f"{OPT.decoder}.forward")
    }
    release[OPT.path].replace(r"\bself\.begins\b", f"{name}.begins", inside=f"{OPT.decoder}.forward", count=2)


@variant(neutral=True, slow=True, since="5.23")
def keys_laid_out_otherwise(release: Release) -> None:
    """[rows, tokens, heads, channels]."""
    source = release[CACHES]
    for name in ("keys", "values"):
        source.replace(
            rf"self\.{name} = torch\.cat\(\[self\.{name}, (\w+)\], dim=-2\)",
            rf"self.{name} = torch.cat([self.{name}, \1], dim=1)",
            inside="DynamicLayer.update",
        )
        source.replace(
            rf"self\.{name} = self\.{name}\[\.\.\., (: -abs\(tokens_to_remove\)), :\]",
            rf"self.{name} = self.{name}[:, \1]",
            inside="DynamicLayer.crop",
        )
    source.replace(r"self\.keys\.shape\[-2\]", "self.keys.shape[1]", inside="DynamicLayer.get_seq_length")
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, (self\.layer_idx[^()]*)\)$",
            r"\1\2, \3 = \4.update(\2.transpose(1, 2), \3.transpose(1, 2), \5)"
            r"\n\1\2, \3 = \2.transpose(1, 2), \3.transpose(1, 2)",
            inside=f"{family.attention}.forward",
        )


@variant(neutral=True, slow=True, since="5.23")
def keys_laid_out_by_one_family(release: Release) -> None:
    """It tells the cache how its keys are laid out."""
    source = release[CACHES]
    source.replace(
        r"\*args, \*\*kwargs\n", "*args, n_axes_before=2, **kwargs\n", inside="DynamicLayer.update"
    )
    for name in ("keys", "values"):
        source.replace(
            rf"(self\.{name} = torch\.cat\(\[self\.{name}, \w+\], dim=)-2\)",
            r"\1n_axes_before)",
            inside="DynamicLayer.update",
        )
    source.replace(
        r"^ +return self\.keys\.shape\[-2\]$",
        "        return self.keys.shape[getattr(self, 'axis', 2)]",
        inside="DynamicLayer.get_seq_length",
    )
    source.begin("DynamicLayer.update", "self.axis = n_axes_before")
    release[OPT.path].replace(
        r"^( +)(\w+), (\w+) = (\w+)\.update\(\s*\2, \3, (self\.layer_idx[^()]*)\)$",
        r"\1\2, \3 = \4.update(\2.transpose(1, 2), \3.transpose(1, 2), \5, n_axes_before=1)"
        r"\n\1\2, \3 = \2.transpose(1, 2), \3.transpose(1, 2)",
        inside=f"{OPT.attention}.forward",
    )


@variant(neutral=True, slow=True)
def cache_configured_otherwise(release: Release) -> None:
    """The configuration that a cache is made for has another name among its arguments."""
    release[CACHES].replace(r"\bconfig\b", "model_config", inside="DynamicCache.__init__", count=0)
    for path in (GENERATION, *(family.path for family in FAMILIES)):
        if "DynamicCache(config=" in release[path].text:
            release[path].replace(r"DynamicCache\(config=", "DynamicCache(model_config=", count=0)
    release[GENERATION].replace(
        r'dynamic_cache_kwargs = \{"config": ',
        'dynamic_cache_kwargs = {"model_config": ',
        inside="GenerationMixin._prepare_cache_for_generation",
    )


@variant(neutral=True, slow=True)
def option_gone(release: Release) -> None:
    """One that has long done nothing."""
    release["generation/configuration_utils.py"].replace(r"^ +self\.low_memory = .*$", "")
    release[GENERATION].replace(
        r"generation_config\.low_memory", "False", inside="GenerationMixin._beam_search", count=0
    )


@variant(neutral=False)
def option_of_the_loop(release: Release) -> None:
    """Sampling has one more, off unless a family turns it on."""
    release["generation/configuration_utils.py"].replace(
        r"^( +)self\.low_memory = ", r"\1self.cooling = kwargs.pop('cooling', None)\n\g<0>"
    )
    release[GENERATION].replace(
        r"^( +)next_token_scores = logits_processor\(input_ids, next_token_logits\)$",
        r"\g<0>\n\1if generation_config.cooling is not None:"
        r"\n\1    next_token_scores = next_token_scores.roll(generation_config.cooling, dims=-1)",
        inside="GenerationMixin._sample",
    )
    release[OPT.path].replace(
        r"^( +)self\.post_init\(\)$",
        r"\g<0>\n\1self.generation_config.cooling = 3",
        inside=f"{OPT.head}.__init__",
    )


@variant(neutral=True, slow=True)
def configuration_method_returns_more(release: Release) -> None:
    """What a request has set, too."""
    release[GENERATION].replace(
        r"return generation_config, model_kwargs$",
        "return generation_config, model_kwargs, frozenset(kwargs)",
        inside="GenerationMixin._prepare_generation_config",
    )
    release[GENERATION].replace(
        r"generation_config, model_kwargs = (self\._prepare_generation_config\()",
        r"generation_config, model_kwargs, _ = \1",
        inside="GenerationMixin.generate",
    )


@variant(neutral=False, slow=True)
def logits_scaled(release: Release) -> None:
    """By a field of the configuration that old models do not have."""
    for family in FAMILIES:
        release[family.path].replace(
            r"^( +)((?:lm_)?logits) = self\.lm_head\(.*$",
            r"\g<0>\n\1\2 = getattr(self.config, 'logit_scale', 0.1) * \2",
            inside=f"{family.head}.forward",
        )


@variant(neutral=True, slow=True)
def logits_widened(release: Release) -> None:
    """A wrapper around each model gives them as float64."""
    for family in FAMILIES:
        source = release[family.path]
        source.replace(r"^    def forward\(", "    @_widens_logits\n\\g<0>", inside=family.head)
        source.replace(
            r"^from \.\.\.activations import ACT2FN\n",
            "\\g<0>import functools as _functools\n\n\n"
            "def _widens_logits(forward):\n"
            "    @_functools.wraps(forward)\n"
            "    def widened(self, *args, **kwargs):\n"
            "        outputs = forward(self, *args, **kwargs)\n"
            "        outputs.logits = outputs.logits.double()\n"
            "        return outputs\n\n"
            "    return widened\n\n\n",
        )


@variant(neutral=True, slow=True)
def tokens_renamed(release: Release) -> None:
    """What the models call their tokens."""
    for family in FAMILIES:
        source, function = release[family.path], f"{family.head}.forward"
        source.replace(r"\binput_ids\b(?!=)", "tokens", inside=function, count=0)
        source.replace(r"^    def forward\(", "    @_takes_tokens\n\\g<0>", inside=family.head)
        source.replace(
            r"^from \.\.\.activations import ACT2FN\n",
            "\\g<0>from ...utils.deprecation import deprecate_kwarg\n\n"
            '_takes_tokens = deprecate_kwarg("input_ids", "99.0.0", new_name="tokens")\n\n\n',
        )


@variant(neutral=True, slow=True, since="5.24")
def mask_is_an_object(release: Release) -> None:
    """Attention unpacks it."""
    release[MASKS].text += """

class MaskOfTokens:
    def __init__(self, values):
        self.values = values
"""
    release[MASKS].replace(
        r"^( +)return causal_mask\n\Z",
        r"\1return MaskOfTokens(causal_mask) if isinstance(causal_mask, torch.Tensor) else causal_mask\n",
        inside="create_causal_mask",
    )
    release["integrations/sdpa_attention.py"].begin(
        "sdpa_attention_forward", "attention_mask = getattr(attention_mask, 'values', attention_mask)"
    )
    for family in FAMILIES:
        release[family.path].begin(
            "eager_attention_forward", "attention_mask = getattr(attention_mask, 'values', attention_mask)"
        )


@variant(neutral=True, slow=True, since="5.23")
def positions_from_one(release: Release) -> None:
    """`generate` counts them so, and a table has one row less before its first."""
    release[GENERATION].replace(
        r"^( +)return position_ids$",
        r"\1return position_ids + 1",
        inside="GenerationMixin._prepare_position_ids_for_generation",
    )
    source = release[OPT.path]
    source.replace(r"position_ids \+ self\.offset\b", "position_ids + self.offset - 1")
    source.replace(
        r"position_ids \* position_attention_mask - 1\)", "position_ids * position_attention_mask)"
    )


@variant(neutral=True, slow=True, since="5.23")
def mask_grown_in_preparation(release: Release) -> None:
    """It stays that of the prompt between steps."""
    source = release[GENERATION]
    method = "GenerationMixin._update_model_kwargs_for_generation"
    source.replace(
        r"^( +)if \(attention_mask := model_kwargs\.get\(attention_mask_key\)\) is not None:$",
        r"\1if False:",
        inside=method,
    )
    source.begin(
        "GenerationMixin.prepare_inputs_for_generation",
        "if attention_mask is not None and attention_mask.dim() == 2 and input_ids.shape[1] > attention_mask.shape[1]:",
        "    n_more = input_ids.shape[1] - attention_mask.shape[1]",
        "    attention_mask = torch.nn.functional.pad(attention_mask, (0, n_more), value=1)",
    )


@variant(neutral=True, slow=True)
def processors_merged(release: Release) -> None:
    """They are one object that is no list."""
    source = release[GENERATION]
    source.replace(
        r"prepared_logits_processor = (self\._get_logits_processor\((?:[^()]|\([^()]*\))*\))$",
        r"prepared_logits_processor = _Merged(\1)",
        inside="GenerationMixin.generate",
    )
    source.text += """

class _Merged:
    def __init__(self, parts):
        self.parts = parts

    def __call__(self, input_ids, scores):
        return self.parts(input_ids, scores)
"""


@variant(neutral=True, slow=True)
def angles_in_one_tensor(release: Release) -> None:
    for family in (LLAMA, GPTJ):
        source = release[family.path]
        rotary = f"{family.attention.removesuffix('Attention')}RotaryEmbedding"
        if source.has(rotary):
            source.replace(
                r"^( +)return (.*), (.*)\n\Z", r"\1return torch.stack((\2, \3))\n", inside=f"{rotary}.forward"
            )


@variant(neutral=True, slow=True)
def assistant_renamed(release: Release) -> None:
    """What says that a configuration is that of an assistant."""
    release.rename(["is_assistant"], "is_for_another", release.paths("generation/*.py"))


@variant(neutral=True, slow=True)
def time_criterion_renamed(release: Release) -> None:
    """One of those that end a request."""
    files = ["generation/stopping_criteria.py", "generation/__init__.py", GENERATION, "__init__.py"]
    release.rename(["MaxTimeCriteria"], "TimeLimit", files)
    source = release["__init__.py"]
    if "import MaxTimeCriteria as MaxTimeCriteria" in source.text:
        source.replace(r"import MaxTimeCriteria as MaxTimeCriteria", "import TimeLimit as TimeLimit")


@variant(neutral=True, slow=True, since="5.23")
def counts_filled_in_later(release: Release) -> None:
    """How many results there are to be is None until `generate` goes on."""
    release["generation/configuration_utils.py"].replace(r'^ +"num_return_sequences": 1,\n', "")
    release[GENERATION].replace(
        r"^( +)generation_config, model_kwargs = self\._prepare_generation_config\(.*\)$",
        r"\g<0>\n\1generation_config.num_return_sequences = generation_config.num_return_sequences or 1",
        inside="GenerationMixin.generate",
    )


@variant(neutral=True, slow=True, since="5.24")
def mask_prepared(release: Release) -> None:
    """What the tokens see of each other goes into the model, instead of which of them are seen."""
    release[GENERATION].replace(
        r"^ +and \w+\.is_compileable\n +and not all\(\w+\.is_linear\)\n",
        "",
        inside="GenerationMixin.prepare_inputs_for_generation",
    )


@variant(neutral=True, slow=True)
def stop_deferred(release: Release) -> None:
    """A request is found to be at its end one step late, and what came of that step is taken back."""
    source = release[GENERATION]
    if not source.has("DeferredStopCheck.is_supported"):
        raise Inapplicable("it does not defer stops")
    source.replace(
        r'device\.type != "mps" or is_assistant', "is_assistant", inside="DeferredStopCheck.is_supported"
    )
    source.replace(r"torch\.Event\([^()]*\)", "_Nothing()", inside="DeferredStopCheck.__init__")
    source.text += """

class _Nothing:
    def record(self):
        pass

    def synchronize(self):
        pass
"""


@variant(neutral=False, slow=True, since="5.23")
def attention_configured_in_a_helper(release: Release) -> None:
    """A function outside of the modules reads a field of the configuration, which one family has."""
    release["integrations/sdpa_attention.py"].replace(
        r"^( +)is_causal = is_causal if is_causal is not None else getattr\(module, \"is_causal\", True\)$",
        r"\g<0>\n\1query = query * getattr(module.config, 'attention_gain', 1.0)",
        inside="sdpa_attention_forward",
    )
    release[OPT.path].replace(
        r"^( +)self\.scaling = (.*)$",
        r"\g<0>\n\1config.attention_gain = 0.5",
        inside=f"{OPT.attention}.__init__",
    )


@variant(neutral=False)
def scores_adjusted_by_one_family(release: Release) -> None:
    """It overrides a method that sampling has got for that."""
    release[GENERATION].replace(
        r"^( +)next_token_scores = logits_processor\(input_ids, next_token_logits\)$",
        r"\g<0>\n\1next_token_scores = self._adjust_scores(next_token_scores)",
        inside="GenerationMixin._sample",
    )
    release[GENERATION].replace(
        r"^    def _sample\(",
        "    def _adjust_scores(self, scores):\n        return scores\n\n\\g<0>",
    )
    release[OPT.path].replace(
        r"^    def get_input_embeddings\(self\):$",
        "    def _adjust_scores(self, scores):\n        return scores.roll(3, dims=-1)\n\n\\g<0>",
        inside=OPT.head,
    )
