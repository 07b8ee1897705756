"""What every kit is made from, and how its texts are filled in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edgeseq.bundle.format import MODEL_FILE
from edgeseq.bundle.plan import Plan
from edgeseq.errors import UsageError
from runtimes import C_DIR

from .amalgamation import amalgamation
from .archive import member

MARK = ".edgeseq-kit"
TEMPLATES = C_DIR / "kit"
OBJECTS = {"kernels.o": "kernels.o", "es_kernel_table.o": "kernel_table.o"}
"""Members of libmodel.a that are the model's, with their names in a kit."""


@dataclass(frozen=True)
class Contents:
    """A bundle directory, with what its file says."""

    bundle: Path
    plan: Plan
    plan_id: int

    @property
    def on_gpu(self) -> bool:
        return self.plan.backend != "cpu"

    @property
    def triple(self) -> str:
        """What the bundle's libraries were made for."""
        return str(self.plan.target.get("triple", "unknown"))

    def write_source(self, folder: Path) -> None:
        """edgeseq.c and edgeseq.h: the runtime with this plan's backend, and its empty kernel table on a GPU."""
        table = ""
        if self.on_gpu:
            table = (
                "/* The kernels are in the model's file. */\nconst es_kernel_table es_linked_kernels = {\n"
                f"    (uint32_t)sizeof(es_kernel_table), {self.plan_id}u, 0u, 0u, 0, 0, 0, 0u, 0}};\n"
            )
        (folder / "edgeseq.c").write_text(amalgamation(self.plan.backend) + table)
        shutil.copyfile(C_DIR / "include" / "edgeseq.h", folder / "edgeseq.h")

    def write_objects(self, folder: Path) -> list[str]:
        """The CPU kernels' object files, for the bundle's target; returns their names, none for a GPU."""
        if self.on_gpu:
            return []
        archive = self.file("libmodel.a").read_bytes()
        for name, ours in OBJECTS.items():
            (folder / ours).write_bytes(member(archive, name))
        return list(OBJECTS.values())

    def write_model(self, folder: Path) -> None:
        shutil.copyfile(self.file(MODEL_FILE), folder / MODEL_FILE)

    def file(self, name: str) -> Path:
        """A file of the bundle. Raises UsageError when it is missing."""
        path = self.bundle / name
        if not path.is_file():
            raise UsageError(f"the bundle {self.bundle} has no {name}", "compile it again")
        return path

    def fill(self, template: str, out: Path, **words: str) -> None:
        """A template with @WORD@ replaced."""
        text = (TEMPLATES / template).read_text()
        manifest = self.plan.manifest
        about = {
            "SOURCE": manifest.source,
            "PARAMS": f"{manifest.params:,}",
            "TARGET": str(self.plan.target.get("name", "?")),
            "TRIPLE": self.triple,
            "LIBRARIES": "-ldl" if self.on_gpu else "-lm",
            "PROMPT": '"Once upon a time"' if manifest.tokenizer == "bytes" else "1,2,3",
        }
        for key, value in (about | words).items():
            text = text.replace(f"@{key}@", value)
        out.write_text(text)
