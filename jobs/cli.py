"""The command `vitok`: one sub-command for each job."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from cluster.local import trust_own_cluster
from jobs import configs, positional
from jobs.command_lines import UsageError, choose, lookup, sub_command
from pipelines.failures import Preempted, root_cause


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    name, *rest = given
    trust_own_cluster()
    try:
        lookup(COMMANDS, name, "command")(rest)
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # the reader of our output, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _complain("interrupted; what is finished is kept", 130)
    except Preempted as error:
        return _complain(str(error), 143)
    except Exception as error:
        if not _is_foreseen(error):
            raise
        return _complain(root_cause(error), 1)
    return 0


def train(arguments: Sequence[str]) -> None:
    """train an autoencoder by a recipe; the same run name continues"""
    from cluster.local import ray_session
    from pipelines.train_autoencoder import prepare, run_training

    settings = prepare(configs.training(arguments))
    with ray_session():
        export = run_training(settings)
    print(f"run: {settings.run.folder.uri}\nweights: {export.uri}")


def sweep(arguments: Sequence[str]) -> None:
    """many trainings compared, on Ray Tune (and sweep report NAME: what they say)"""
    from cluster.local import ray_session
    from jobs.sweep import costs_of, format_costs, report
    from pipelines.sweep import prepare_sweep, run_sweep

    if arguments and arguments[0] == "report":
        tyro.cli(report, args=arguments[1:], prog="vitok sweep report")
        return
    settings = configs.sweep(arguments)
    print(format_costs(settings, costs_of(settings)), flush=True)
    if settings.dry_run:
        return
    settings = prepare_sweep(settings)
    with ray_session():
        records = run_sweep(settings)
    ended = ", ".join(
        f"{number} {state}" for state, number in Counter(r.state for r in records).items()
    )
    print(f"trials: {ended}\nreport: {settings.folder.child('report').uri}/report.md")


def flow(arguments: Sequence[str]) -> None:
    """train a generator on cached latents by a recipe; the same run name continues"""
    from cluster.local import ray_session
    from pipelines.train_flow import prepare, run_training

    settings = prepare(configs.flow(arguments))
    with ray_session():
        run = run_training(settings)
    print(f"run: {run.uri}")


def sample(arguments: Sequence[str]) -> None:
    """a sheet of images that a trained generator makes"""
    from jobs import flow

    tyro.cli(flow.sample, args=arguments, prog="vitok sample")


def judge(arguments: Sequence[str]) -> None:
    """gFID, gFDD, Inception Score, precision and recall of generated images"""
    from pipelines.generation.judge import Judging
    from pipelines.generation.judge import judge as judge_set

    settings = tyro.cli(
        Judging,
        args=arguments,
        prog="vitok judge",
        description="gFID, gFDD, Inception Score, precision and recall of generated images.",
    )
    for name, quality in judge_set(settings).items():
        print(name)
        _print_table({key: str(value) for key, value in asdict(quality).items() if value != ""})
    print(f"results: {Path(settings.out).absolute()}")


def curves(arguments: Sequence[str]) -> None:
    """a metric of generators' trainings against the operations they took"""
    from jobs import flow

    tyro.cli(flow.curves, args=arguments, prog="vitok curves")


def joint(arguments: Sequence[str]) -> None:
    """generators of several sizes on several autoencoders: a metric against operations"""
    from jobs import flow

    flow.run_joint(configs.joint(arguments))


def generate(arguments: Sequence[str]) -> None:
    """many images of a generator as shards; goes on where it was stopped"""
    from jobs import flow

    flow.generate_set(configs.generation(arguments))


def evaluate(arguments: Sequence[str]) -> None:
    """reconstruction metrics of models and of others, by a recipe"""
    from contextlib import nullcontext

    from cluster.local import ray_session
    from pipelines.evaluate import evaluate as run_evaluation
    from pipelines.evaluation.report import REPORT, log_to_runs, write_results
    from pipelines.reading.shards import local_folder
    from pipelines.reconstruction import flat

    settings = configs.evaluation(arguments)
    out = local_folder(settings.out)
    with ray_session() if settings.num_workers else nullcontext():
        result = run_evaluation(settings, lambda found: write_results(settings, found, out))
    write_results(settings, result, out)
    log_to_runs(settings, result, out)
    if settings.json:
        _print_json([flat(score) for score in result.scores])
    else:
        print((out / REPORT).read_text())
        print(f"results: {out}")
    if result.failed:
        listed = "; ".join(f"{name}: {why}" for name, why in result.failed.items())
        raise ValueError(f"not everything could be evaluated: {listed}")


def encode(arguments: Sequence[str]) -> None:
    """encode a corpus into a latent cache by a recipe; goes on where it was stopped"""
    from jobs.latents import run_encoding

    run_encoding(configs.caching(arguments))


def reconstruct(arguments: Sequence[str]) -> None:
    """original, reconstruction and error map of images"""
    from jobs.reconstruct import reconstruct as reconstruct_images

    tyro.cli(reconstruct_images, args=arguments, prog="vitok reconstruct")


def export(arguments: Sequence[str]) -> None:
    """weights of a run's newest checkpoint, as a folder to load or to publish"""
    from pipelines.autoencoder_weights import export_run
    from vitok.pretrained import WEIGHT_FILES
    from vitok.storage import Folder

    def write(
        run: positional.Run,
        folder: positional.Folder,
        /,
        *,
        average: bool = True,
    ) -> None:
        """Write encoder.safetensors, decoder.safetensors and config.json; the run may go on.

        Args:
            run: folder of a training run, such as runs/NAME.
            folder: where the files go, a folder or s3:// prefix without weights.
            average: take the moving average of the weights where the run keeps one.
        """
        target = Folder.of(folder)
        if there := [file for file in WEIGHT_FILES if target.exists(file)]:
            raise FileExistsError(
                f"{target.uri} holds {there[0]} already; give another folder, or delete that one"
            )
        _, steps = export_run(Folder.of(run), target, average=average)
        print(f"weights after step {steps}: {target.uri}")

    tyro.cli(write, args=arguments, prog="vitok export")


def models(arguments: Sequence[str]) -> None:
    """names, parameters, compression and cost of the models"""
    from jobs.models import describe_models, format_models

    def show(names: positional.Names, /, *, json: bool = False) -> None:
        """Show what models are and what an image costs; without names the released ones and more.

        Args:
            names: as in Ld4-L/16x64, linear-B/16x64, v1/S-L/16x16 or 350M-f16x64.
            json: print JSON.
        """
        described = describe_models(names)
        if json:
            _print_json([asdict(model) for model in described])
        else:
            print(format_models(described))

    tyro.cli(show, args=arguments, prog="vitok models")


def quickstart(arguments: Sequence[str]) -> None:
    """see the whole system work on this machine in a few minutes"""
    from jobs.quickstart import run_quickstart

    tyro.cli(run_quickstart, args=arguments, prog="vitok quickstart")


def ui(arguments: Sequence[str]) -> None:
    """MLflow on the runs of this machine"""
    from cluster.local import serve_mlflow
    from pipelines.tracking import local_tracking_uri

    def serve(storage: str = "runs", port: int = 5000) -> None:
        """Show the runs in MLflow's web interface, on loopback, until Ctrl-C.

        Args:
            storage: folder that holds the runs.
            port: TCP port on 127.0.0.1.
        """
        if not (Path(storage) / "mlflow.db").is_file():
            raise FileNotFoundError(
                f"{Path(storage).absolute()} holds no mlflow.db; give the folder of the runs with "
                "--storage, or make one with `vitok quickstart`"
            )
        serve_mlflow(local_tracking_uri(storage), port)

    tyro.cli(serve, args=arguments, prog="vitok ui")


def corpus(arguments: Sequence[str]) -> None:
    """shards of images, their manifest, checks and plans (corpus build, index, check, plan)"""
    from jobs.corpus import CORPUS_COMMANDS

    sub_command("corpus", CORPUS_COMMANDS, arguments)


def latents(arguments: Sequence[str]) -> None:
    """latent caches: check, contents, other formats (latents verify, stats, ls, export, plan)"""
    from jobs.latents import LATENT_COMMANDS

    sub_command("latents", LATENT_COMMANDS, arguments)


def bench(arguments: Sequence[str]) -> None:
    """benchmarks; JSON on the last line"""
    from jobs.bench import BENCHMARKS, load_benchmark

    name, rest = choose("bench", BENCHMARKS, arguments)
    tyro.cli(load_benchmark(name), args=rest, prog=f"vitok bench {name}")


def submit(arguments: Sequence[str]) -> None:
    """run train, flow, joint, generate, sweep, encode or evaluate as a job on a Ray cluster"""
    from jobs.submit import submit as submit_job

    submit_job(arguments, configs.SUBMITTED)


def jobs(arguments: Sequence[str]) -> None:
    """jobs on a Ray cluster (jobs ls, status, logs, stop)"""
    from jobs.remote import JOBS_COMMANDS

    sub_command("jobs", JOBS_COMMANDS, arguments)


def cluster(arguments: Sequence[str]) -> None:
    """Ray, MLflow and a store on this machine (cluster up, status, down)"""
    from cluster.stack import CLUSTER_COMMANDS

    sub_command("cluster", CLUSTER_COMMANDS, arguments)


def doctor(arguments: Sequence[str]) -> None:
    """what is wrong with this machine or a cluster, and what to do about it"""
    from jobs.doctor import doctor as examine

    tyro.cli(examine, args=arguments, prog="vitok doctor")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "quickstart": quickstart,
    "train": train,
    "flow": flow,
    "sample": sample,
    "generate": generate,
    "judge": judge,
    "joint": joint,
    "curves": curves,
    "sweep": sweep,
    "evaluate": evaluate,
    "reconstruct": reconstruct,
    "export": export,
    "models": models,
    "corpus": corpus,
    "encode": encode,
    "latents": latents,
    "submit": submit,
    "jobs": jobs,
    "cluster": cluster,
    "doctor": doctor,
    "ui": ui,
    "bench": bench,
}


def _overview() -> str:
    lines = ["usage: vitok COMMAND [ARGUMENTS]      (vitok COMMAND --help shows every field)", ""]
    lines += [f"  {name:<12} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _print_json(document: Any) -> None:
    print(json.dumps(document))


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def _is_foreseen(error: Exception) -> bool:
    """Whether a sentence is enough; anything else is our mistake and shows its traceback."""
    if type(error).__module__.split(".")[0] in ("ray", "mlflow"):
        return True
    return isinstance(error, ValueError | OSError | RuntimeError | ArithmeticError | ImportError)


def _complain(message: str, status: int) -> int:
    print(f"vitok: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
