"""Score distillation for text-to-3D: `import scaledreamer as sd`, then `sd.train`, `sd.asd`, ...

The names below are imported when they are first used, so that importing the package stays fast.
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module

_PUBLIC = {
    "core.figures": ("curves", "show_images"),
    "core.tensors": ("make_rng", "seed_everything"),
    "camera.poses": ("orbit",),
    "camera.rays": ("camera_rays",),
    "toybox.captions": ("object_of",),
    "toybox.renders": ("render_object",),
    "prior.guidance": ("classifier_free_guidance",),
    "prior.mixture": ("MixturePrior",),
    "prior.stable_diffusion": ("StableDiffusionPrior",),
    "prior.toybox_mixture": ("toybox_mixture",),
    "distill.conditioning": ("make_conditioning",),
    "distill.methods": ("asd", "csd", "sds"),
    "distill.shift": ("deterministic_shift", "random_shift"),
    "distill.vsd": ("vsd",),
    "noise_error.measure": ("measure_curve",),
    "toy.lockstep": ("Lockstep",),
    "generator.hyper_ingp": ("HyperINGP",),
    "generator.ingp": ("INGP",),
    "rendering.render_settings": ("RenderSettings",),
    "rendering.volume": ("render", "render_views"),
    "training.step_inspection": ("inspect_step",),
    "training.train_settings": ("TrainSettings",),
    "training.trainer": ("open_run",),
    "eval.clip": ("ClipScorer",),
    "sharing.hub": ("SharedGenerator",),
    "view.mesh": ("extract_mesh", "save_mesh"),
    "view.mesh_page": ("save_mesh_page",),
    "view.run_comparison": ("compare_runs",),
    "view.turntable": ("turntable_frames",),
    "widgets.curve_explorer": ("CurveExplorer",),
    "widgets.dashboard": ("watch",),
    "widgets.jobs": ("train",),
    "widgets.launch": ("launch",),
    "widgets.mesh_viewer": ("show_mesh",),
    "widgets.scene_viewer": ("SceneViewer",),
    "widgets.step_viewer": ("StepViewer",),
    "widgets.stepper": ("Stepper",),
    "widgets.text_slider": ("TextSlider",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
