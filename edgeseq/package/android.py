"""The kit for Android apps: what the NDK builds, and the classes ai.edgeseq.Model and Session."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgeseq.errors import UsageError
from runtimes import C_DIR

from .contents import TEMPLATES, Contents

OPENCL_NOTE = """    <!-- from Android 12 on, an app sees the vendor's OpenCL only if it says so -->
    <uses-native-library android:name="libOpenCL.so" android:required="false" />
    <uses-native-library android:name="libOpenCL-pixel.so" android:required="false" />
"""


def write(contents: Contents, folder: Path) -> None:
    if contents.plan.backend == "cuda":
        raise UsageError("a bundle for CUDA runs on no phone", "compile for a phone's profile: `edgeseq list devices`")
    if not contents.on_gpu and contents.plan.target.get("platform") != "android":
        raise UsageError(
            f"the bundle's kernels were compiled for {contents.triple}, not for Android",
            "compile for a profile whose triple is aarch64-linux-android",
        )
    native, java, assets = folder / "cpp", folder / "java" / "ai" / "edgeseq", folder / "assets"
    for path in (native, java, assets):
        path.mkdir(parents=True)
    contents.write_source(native)
    contents.write_model(assets)
    objects = contents.write_objects(native)
    contents.fill("android/CMakeLists.txt", native / "CMakeLists.txt", OBJECTS=" ".join(objects))
    shutil.copyfile(TEMPLATES / "android" / "edgeseq_jni.c", native / "edgeseq_jni.c")
    for tool in sorted((C_DIR / "tools").iterdir()):
        shutil.copyfile(tool, native / tool.name)
    for source in sorted((TEMPLATES / "android" / "java" / "ai" / "edgeseq").iterdir()):
        shutil.copyfile(source, java / source.name)
    contents.fill(
        "android/README.md", folder / "README.md",
        MANIFEST=OPENCL_NOTE if contents.on_gpu else "    <!-- nothing: the model runs on the CPU -->\n",
        OBJECTS="".join(f" {o}" for o in objects),
    )  # fmt: skip
