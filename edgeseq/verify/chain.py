"""`verify`: the chain on one page.

| stage | compared with | file |
|---|---|---|
| PyTorch whole, step, chunks (`live`) | the golden of the export | torch_live.py |
| onnxruntime step, chunks, each chunk graph | the golden; the smaller graph | onnx.py |
| runtime step, prefill, chunk graphs, state, greedy tokens | the golden; the smaller graph; itself | runtime.py |
| the driver on a device: the same | the golden | device.py |

Every bound comes from tolerances.py.
"""

from __future__ import annotations

from pathlib import Path

from edgeseq.bundle.directory import is_bundle
from edgeseq.errors import UsageError
from edgeseq.manifest import load_manifest
from edgeseq.verify.report import Report, Stage


def verify(
    path: str | Path,
    *,
    device: str | None = None,
    export: str | Path | None = None,
    live: bool = False,
    threads: int | None = None,
) -> Report:
    """Check a bundle or an export directory; the report says what was compared and whether it passed.

    device: a device profile; the bundle's driver then runs there instead of the library here.
    export: the export a bundle was made from; its onnxruntime stages come first, and both must be the same model.
    live:   build the PyTorch model again from the source that the manifest names.
    Raises UsageError for a wrong request, BundleError for damage that keeps the model from running, RuntimeFailure or
    DeviceError when it cannot run where it should.
    """
    path = Path(path)
    if is_bundle(path):
        return _bundle(path, device, None if export is None else Path(export), live, threads)
    if device is not None or export is not None:
        raise UsageError(f"{path} is not a bundle", "--device and --export go with a bundle")
    manifest = load_manifest(path)
    stages = tuple(_export_stages(path, live, threads))
    return Report(str(path), "export", manifest.source, manifest.model_id, "", stages)


def _export_stages(path: Path, live: bool, threads: int | None) -> list[Stage]:
    from edgeseq.verify.onnx import onnx_stages

    stages = []
    if live:
        from edgeseq.verify.torch_live import live_stages

        stages += live_stages(path)
    return stages + onnx_stages(path, threads)


def _bundle(path: Path, device: str | None, export: Path | None, live: bool, threads: int | None) -> Report:
    from edgeseq.verify.runtime import bundle_manifest, runtime_stages

    if live and export is None:
        raise UsageError("--live needs the export that the bundle was made from", "add --export DIR")
    manifest = bundle_manifest(path)
    stages: list[Stage] = []
    if export is not None:
        stages.append(_same_model(manifest.model_id, export))
        if not stages[0].ok:  # what follows would compare two models
            return Report(str(path), "bundle", manifest.source, manifest.model_id, device or "", tuple(stages))
        stages += _export_stages(export, live, threads)
    if device is None:
        stages += runtime_stages(path, threads)
    else:
        from devices.profile import load_profile
        from edgeseq.verify.device import device_stages

        stages += device_stages(path, load_profile(device), threads)
    return Report(str(path), "bundle", manifest.source, manifest.model_id, device or "", tuple(stages))


def _same_model(model_id: str, export: Path) -> Stage:
    theirs = load_manifest(export).model_id
    note = "" if theirs == model_id else f"the export is {theirs}, the bundle {model_id}: compile it again"
    return Stage("bundle", "export", None, None, "", theirs == model_id, note)
