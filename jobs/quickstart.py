"""`vitok quickstart`: corpus, training, evaluation, latents and their record, on one machine."""

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from cluster.local import ray_session
from jobs import encoding, evaluations, flow_recipes, recipes
from jobs.sample_corpus import make_sample_corpus
from pipelines import train_flow
from pipelines.autoencoder_training import AutoencoderTraining, plan_of
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.cache_latents import cache_latents
from pipelines.caching.judge import decode_row
from pipelines.caching.verify import require_intact, verify_here
from pipelines.evaluate import evaluate
from pipelines.evaluation.report import write_results
from pipelines.generation.generate import Generator
from pipelines.generation.sampling import Request
from pipelines.latents import LatentCache
from pipelines.reading.shards import local_folder
from pipelines.reconstruction import Metrics, sheet_of
from pipelines.runs import next_step
from pipelines.tracking import Tracker, open_run
from pipelines.train_autoencoder import prepare, run_training
from vitok.pretrained import encoder_digest

_SAMPLES_PER_CLASS = 4


def run_quickstart(storage: str = "runs", fresh: bool = False, flow: bool = False) -> None:
    """See the whole system work on this machine: corpus, training, evaluation, latents, MLflow.

    Needs no network and about four minutes on two CPU cores. Run again, it goes on where it was.

    Args:
        storage: folder for the run, its corpus and its latents, and the MLflow database.
        fresh: delete what an earlier quickstart left in that folder, and start over.
        flow: at the end train a generator on the latents too, and sample from it: some minutes
            more.
    """
    started = time.monotonic()
    folder = local_folder(storage) / "quickstart"
    if fresh and folder.exists():
        if not (folder / "corpus" / "corpus.json").is_file():
            raise FileExistsError(
                f"{folder} was not made by a quickstart; give another folder with --storage"
            )
        shutil.rmtree(folder)
        shutil.rmtree(local_folder(storage) / flow_recipes.flow_quickstart().run.name, True)

    _headline(
        "1/5", f"corpus: crops of photographs, as WebDataset shards, in {_short(folder / 'corpus')}"
    )
    train_manifest, eval_manifest = make_sample_corpus(folder / "corpus")
    base = recipes.quickstart()
    settings = prepare(
        replace(
            base,
            data=replace(base.data, manifest=str(train_manifest), eval_manifest=str(eval_manifest)),
            run=replace(base.run, storage=storage),
        )
    )
    with ray_session():
        _headline("2/5", _describe(settings))
        export = run_training(settings)

        _headline("3/5", "evaluation on photographs that the training never saw")
        evaluation = replace(
            evaluations.quickstart(),
            subjects=(export.uri,),
            data=str(eval_manifest),
            out=str(folder / "evaluation"),
            token_budget=(max(settings.stages[-1].token_budgets),),
        )
        result = evaluate(evaluation)
        write_results(evaluation, result, folder / "evaluation")
        scores = result.scores[0].metrics
        print(f"PSNR {scores.psnr:.2f} dB, SSIM {scores.ssim:.3f}")

        _headline("4/5", "latents of the whole corpus")
        manifest = cache_latents(
            replace(
                encoding.quickstart(),
                manifest=str(train_manifest),
                model=export.uri,
                out=str(folder / "latents"),
            )
        )
        _headline("5/5", "reading the latents back")
        model = load_autoencoder(export.uri)
        cache = LatentCache(str(folder / "latents"), encoder_digest(model))
        require_intact(verify_here(cache.location), cache.location)
        decoded = decode_row(model, cache[0])
        print(
            f"{len(cache)} latents are as they were written; the first, {cache[0].key}, decodes to "
            f"{decoded.shape[2]} x {decoded.shape[1]} pixels"
        )
        with open_run(
            settings.run.folder, settings.run.name, settings.run.tracking, storage, settings
        ) as tracker:
            _record(tracker, folder, scores, manifest.num_bytes, plan_of(settings).num_steps)
            rates = tracker.latest_metrics()
        if flow:
            generate_samples(storage, folder)
    _summary(settings, scores, rates, folder, time.monotonic() - started)


def generate_samples(storage: str, folder: Path) -> Path:
    """Train a small generator on squares of the quickstart's images, and draw what it makes.

    Squares have a quarter of the tokens of whole images: a few minutes teach more.

    Args:
        folder: of the quickstart: its corpus and its autoencoder.

    Returns:
        the sheet: all classes once for each seed.
    """
    base = flow_recipes.flow_quickstart()
    cache = folder / "latents-squares"
    _headline("flow", f"latents of squares, then a generator of {base.model.num_classes} classes")
    with ray_session():
        cache_latents(
            replace(
                encoding.quickstart(),
                manifest=str(folder / "corpus" / "train"),
                model=str(folder / "export"),
                out=str(cache),
                token_budgets=(),
                squares=(base.eval_size[0],),
            )
        )
        settings = train_flow.prepare(
            replace(
                base,
                cache=str(cache),
                autoencoder=str(folder / "export"),
                run=replace(base.run, storage=storage),
            )
        )
        run = train_flow.run_training(settings)
    generator = Generator.load(run, "", torch.device("cpu"), torch.float32)
    requests = [
        Request(seed * settings.model.num_classes + label, label, settings.eval_size)
        for seed in range(_SAMPLES_PER_CLASS)
        for label in range(settings.model.num_classes)
    ]
    images = generator.images(requests, settings.sampler, settings.row_tokens)
    sheet = folder / "samples.png"
    Image.fromarray(sheet_of(images)).save(sheet)
    print(f"samples of {settings.model.num_classes} classes: {_short(sheet)}")
    return sheet


def _describe(settings: AutoencoderTraining) -> str:
    steps, done = plan_of(settings).num_steps, next_step(settings.run.folder)
    if done >= steps:
        return "training: finished by an earlier quickstart; --fresh starts over"
    if done:
        return f"training: goes on at step {done} of {steps}; --fresh starts over"
    budgets = " then ".join(str(stage.token_budgets[0]) for stage in settings.stages)
    return (
        f"training: {steps} steps at {budgets} tokens an image, {settings.run.num_workers} "
        "workers; starting them takes half a minute"
    )


def _record(tracker: Tracker, folder: Path, scores: Metrics, latent_bytes: int, step: int) -> None:
    tracker.log_files(folder / "evaluation" / "results.json", "evaluation")
    tracker.log_files(folder / "evaluation" / "reconstructions.png", "evaluation")
    tracker.log_files(folder / "latents" / "manifest.json", "latents")
    final = {
        "final_eval_psnr": scores.psnr,
        "final_eval_ssim": scores.ssim,
        "latent_bytes": float(latent_bytes),
    }
    if tracker.last_step("final_eval_psnr") < step:  # a second quickstart finds it there
        tracker.log_metrics(final, step)


def _summary(
    settings: AutoencoderTraining,
    scores: Metrics,
    rates: dict[str, float],
    folder: Path,
    seconds: float,
) -> None:
    patch = settings.model.patch_size
    rows = [
        ("PSNR of the reconstructions", f"{scores.psnr:.2f} dB"),
        (
            f"PSNR of one colour for each {patch} x {patch} patch",
            f"{scores.baseline_psnr:.2f} dB",
        ),
        ("SSIM", f"{scores.ssim:.3f}"),
        ("training speed, at the end", f"{rates.get('tokens_per_s', 0):,.0f} tokens/s"),
        ("token utilisation, at the end", f"{rates.get('token_utilisation', 0):.3f}"),
        ("picture", _short(folder / "evaluation" / "reconstructions.png")),
        ("weights", _short(folder / "export")),
        ("latents", _short(folder / "latents")),
        ("corpus", _short(folder / "corpus")),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\nDone in {seconds / 60:.1f} minutes.\n")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    # In a virtual environment that is not activated, the command has no name but its path.
    command = "vitok" if shutil.which("vitok") else _short(Path(sys.argv[0]))
    storage = _short(folder.parent)
    option = "" if storage == "runs" else f" --storage {storage}"
    mlflow = os.environ.get("MLFLOW_TRACKING_URI") or f"{command} ui{option}"
    print(f"\nSee curves and images in MLflow:  {mlflow}")
    print(f"Reconstruct an image of yours:    {command} reconstruct IMAGE --model {_short(folder)}")


def _short(path: Path) -> str:
    """Name a path from the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _headline(number: str, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)
