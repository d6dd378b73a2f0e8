"""What holds for the code as a whole: who imports whom, sizes, and no setting without effect."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

from digzsl_jax import main

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "digzsl_jax"
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in (PACKAGE, "configs", "launch")
               for path in (ROOT / folder).rglob("*.py"))

# A part of the package (module or folder below it) and the parts that it may import.
LIBRARY = {"models", "diffusion", "samplers", "data", "gaussians", "losses", "metrics", "multilabel_metrics",
           "segmentation_metrics", "optimisers", "quality", "shortcuts", "consistency"}
TOOLS = {"processes", "programs", "mesh", "fsdp", "checkpoint", "logs", "mask_files", "report_page", "report_parts",
         "report_quality", "files", "cli"}
WORKSPACES = {"base_workspace", "workspace", "multilabel_workspace", "decoder_workspace", "tag_workspace"}
MAY_IMPORT = {
    "__init__": set(),
    "main": {"runs", "bench", "stages", *WORKSPACES, *TOOLS},
    "stages": {"base_workspace", *TOOLS},
    "report": {"merged_runs", "bench", *TOOLS},
    "merged_runs": {"report_page", "files"},
    "convert": {"files"},
    "generate": {"batches", *LIBRARY, *TOOLS},
    "tagger": {"native_batches", "models", "data"},
    "segmenter": {"native_batches", "models", "data"},
    "native_batches": {"models", "data"},
    "tag": {"tagger", "segmenter", "tag_records", "mask_folder", "contact_sheet", "label_texts", "base_workspace",
            *LIBRARY, *TOOLS},
    "tag_records": {"files"},
    "mask_folder": {"segmenter", "tag_records", "mask_files", "contact_sheet", "data", "files"},
    "contact_sheet": {"data", "report_page", "report_parts", "files"},
    "predict": {"runs", "base_workspace", "workspace", *LIBRARY, *TOOLS},
    "verify": {"verify", *LIBRARY, *TOOLS},
    "bench": {"bench", "runs", "base_workspace", "tagger", "flops", "verify", *LIBRARY, *TOOLS},
    "flops": {"models"},
    "runs": {*WORKSPACES, "loop", "batches", "label_texts", "tagger", "segmenter", "features", "world_export",
             *LIBRARY, *TOOLS},  # but never each other
    "loop": {"models", "checkpoint", "logs"},
    "world_export": {"models", "diffusion", "data", "loop", "checkpoint", "files"},
    "batches": set(),
    "base_workspace": {"label_texts", *LIBRARY, *TOOLS},
    "label_texts": {"data", "models", "losses", "checkpoint"},
    "workspace": {"base_workspace", "features", *LIBRARY, *TOOLS},
    "multilabel_workspace": {"base_workspace", "data"},
    "decoder_workspace": {"multilabel_workspace", "base_workspace", "label_texts", *LIBRARY, *TOOLS},
    "tag_workspace": {"multilabel_workspace", "base_workspace", "label_texts", *LIBRARY, *TOOLS},
    "features": {"data", "checkpoint", "logs", "processes"},
    "models": {"models", "diffusion", "losses", "files", "resize", "fsdp"},
    "diffusion": {"samplers"},
    "shortcuts": {"diffusion", "models"},
    "consistency": {"diffusion", "samplers", "models"},
    "samplers": set(),
    "gaussians": set(),
    "losses": set(),
    "metrics": set(),
    "multilabel_metrics": set(),
    "segmentation_metrics": set(),
    "optimisers": set(),
    "quality": set(),
    "resize": set(),
    "data": {"data", "files", "resize"},
    **{tool: {"files", "processes"} - {tool} for tool in TOOLS - {"mesh", "fsdp"}},
    "mesh": {"fsdp", "programs"},
    "fsdp": set(),
    "report_quality": {"report_page"},
    "report_parts": {"report_page"},
}
NO_FILES = LIBRARY - {"data"} | {"resize"}
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "glob", "json", "absl", "ml_collections"}
OPENERS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
READS_FILES = {f"{PACKAGE}/models/{name}.py" for name in ("hub", "download")}
# `load(folder)` of these joins a folder's name with those of its parts and leaves the reading to hub.
NAMES_FOLDERS = {f"{PACKAGE}/models/{name}.py" for name in
                 ("stable_diffusion", "single_file", "cdm", "inception", "tresnet", "ml_decoder")}
ORACLES = {"torch", "torchvision", "diffusers", "transformers", "timm", "sklearn"}
CONVERTER = f"{PACKAGE}/convert.py"  # reads pickles, which only PyTorch can; loads it when it is called
# The oracle itself, run in a process of its own and imported by nothing.
REFERENCES = {f"{PACKAGE}/{part}/reference.py" for part in ("verify", "bench")}
SLOW_OPTIONAL = {"tensorflow", "tensorflow_datasets", "grain", "scipy", "h5py", "pycocotools"}


def tree_of(file: str) -> ast.Module:
  return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(tree: ast.AST) -> Iterator[str]:
  """Dotted names of everything imported below `tree`; `from a import b` gives `a.b`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"line {node.lineno}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file: str) -> str:
  """`models` for digzsl_jax/models/vae.py, `losses` for digzsl_jax/losses.py."""
  return pathlib.PurePath(file).relative_to(PACKAGE).with_suffix("").parts[0]


def in_package(*parts: str) -> list[str]:
  return [file for file in FILES if file.startswith(f"{PACKAGE}/") and (not parts or part_of(file) in parts)]


@pytest.mark.parametrize("file", in_package())
def test_imports_point_inwards(file):
  part = part_of(file)
  assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
  own = {name.split(".")[1] for name in imports(tree_of(file)) if name.startswith(f"{PACKAGE}.")}
  assert own <= MAY_IMPORT[part], f"{file} imports {sorted(own - MAY_IMPORT[part])}"


@pytest.mark.parametrize("file", in_package())
def test_heavy_packages_stay_out(file):
  tree = tree_of(file)
  # A function's own import costs nothing until it is called.
  at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
  found = {name.split(".")[0] for name in imports(at_import if file == CONVERTER else tree)}
  assert file in REFERENCES or not found & ORACLES, "oracles belong to tests alone"
  assert not {f"{PACKAGE}.verify.reference", f"{PACKAGE}.bench.reference"} & set(imports(tree))
  assert not {name.split(".")[0] for name in imports(at_import)} & SLOW_OPTIONAL, "import it where it is used"


@pytest.mark.parametrize("file", in_package(*NO_FILES))
def test_models_know_no_files(file):
  if file in READS_FILES:
    return
  tree = tree_of(file)
  allowed = {"os", "pathlib"} if file in NAMES_FOLDERS else set()
  assert not {name.split(".")[0] for name in imports(tree)} & FILE_MODULES - allowed
  for node in ast.walk(tree):
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    assert called.split(".")[-1] not in OPENERS, f"{file}:{node.lineno} {called}"


@pytest.mark.parametrize("file", in_package("data", "mask_files", "samplers"))
def test_data_and_tables_know_no_jax(file):
  assert not {name.split(".")[0] for name in imports(tree_of(file))} & {"jax", "jaxlib", "flax", "optax"}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("configs/")])
def test_configs_are_data(file):
  tree = tree_of(file)
  said = ast.get_docstring(tree)
  assert file.endswith("base.py") or all(f"\n{part}: " in said for part in ("Command", "Took", "Result"))
  foreign = [name for name in imports(tree)
             if name.split(".")[0] != "ml_collections" and not name.startswith("configs.base")]
  assert not foreign, f"{file} imports {foreign}"


@pytest.mark.parametrize("file", FILES)
def test_sizes(file):
  tree, text = tree_of(file), (ROOT / file).read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 450
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
  lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
  assert not {name: length for name, length in lengths.items() if length > 75}


def configured(tree: ast.Module) -> set[str]:
  """Names of the classes that are filled from the config: `parse(Name, ...)` and `Name(**...)`."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      if ast.unparse(node.func).split(".")[-1] == "parse" and node.args:
        names.add(ast.unparse(node.args[0]))
      elif any(keyword.arg is None for keyword in node.keywords):
        names.add(ast.unparse(node.func))
  return names


class Reads(ast.NodeVisitor):
  """The fields that a module reads of settings of class `kind`.

  They are read as `settings.x`, `something.settings.x`, and `self.x` in the class itself. What its
  `__post_init__` reads does not count: a field that is only checked has no effect.
  """

  def __init__(self, kind: str):
    self.kind, self.inside, self.fields = kind, False, set()

  def visit_ClassDef(self, node):
    outer, self.inside = self.inside, node.name == self.kind
    self.generic_visit(node)
    self.inside = outer

  def visit_FunctionDef(self, node):
    if not (self.inside and node.name == "__post_init__"):
      self.generic_visit(node)

  def visit_Attribute(self, node):
    owner = ast.unparse(node.value).split(".")[-1]
    if owner in {"settings", self.kind.lower()} or (self.inside and owner == "self"):
      self.fields.add(node.attr)
    self.generic_visit(node)


def unread(tree: ast.Module) -> dict[str, set[str]]:
  """Fields without effect in a module, by class, of all dataclasses that are filled from the config."""
  dead = {}
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and (node.name in configured(tree) or node.name.endswith("Settings")):
      reads = Reads(node.name)
      reads.visit(tree)
      fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
      if fields - reads.fields:
        dead[node.name] = fields - reads.fields
  return dead


def read_by_others(section: str) -> set[str]:
  """Fields that any run or the workspace reads from the section of another: `config["cdm"]["kind"]`."""
  subscripts = [node for file in in_package("runs", *WORKSPACES) for node in ast.walk(tree_of(file))
                if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript)]
  keys = [(node.value.slice, node.slice) for node in subscripts]
  return {field.value for outer, field in keys if isinstance(outer, ast.Constant)
          and isinstance(field, ast.Constant) and outer.value == section}


@pytest.mark.parametrize("file", in_package("runs", "bench"))
def test_every_setting_has_an_effect(file):
  names = {pathlib.Path(module.__file__).name: name
           for known, _ in main.STAGED.values() for name, module in known.items()}
  elsewhere = read_by_others(names.get(pathlib.Path(file).name, ""))
  for kind, fields in unread(tree_of(file)).items():
    assert fields <= elsewhere, f"{kind} has fields that nothing reads: use them or take them out"


def test_a_dead_setting_is_found():
  code = """
class Settings:
  steps: int
  rate: float
  size: int
  width: int

  def __post_init__(self):
    check(self.size > 0)

  def optimiser(self):
    return adam(self.rate)


class Other:
  def __call__(self):
    return self.width


def run(config):
  settings = parse(Settings, config)
  return range(settings.steps)
"""
  assert unread(ast.parse(code)) == {"Settings": {"size", "width"}}
