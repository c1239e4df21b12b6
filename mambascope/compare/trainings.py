"""The trainings of a list in one folder, several at a time; what is finished is used, what was begun goes on."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import yaml

from mambascope.compare.lists import Comparison
from mambascope.compare.sources import Source, sources_of
from mambascope.models.weights import find_weights
from mambascope.training.trainings import Group, finish_training, finished_weights
from mambascope.utils import atomic_path


@dataclass(frozen=True)
class Training:
    """The training of a source with a seed."""

    source: Source
    seed: int

    def __str__(self) -> str:
        return f"{self.source.name}, seed {self.seed}"


class Trainings:
    """What a list trains.

    Args:
        plan: The list.
        folder: Where run directories and configs are kept.
    """

    def __init__(self, plan: Comparison, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def __iter__(self):
        """Every training once, after the one it starts from; all of a seed, then those of the next."""
        links = (link for name in self.plan.entries for s in sources_of(self.plan, name) for link in s.chain())
        sources = {link.recipe: link for link in links if link.trained}
        return iter([Training(source, seed) for seed in self.plan.seeds for source in sources.values()])

    def run_dir(self, training: Training) -> Path:
        """Run directory: ``NAME-RECIPE-seedN``, where the recipe alone tells what is trained."""
        end = f"{training.source.recipe}-seed{training.seed}"
        name = training.source.name.partition(" ")[0]
        begun = sorted((self.folder / "trainings").glob(f"*-{end}"))  # perhaps for another list or row
        return begun[0] if begun else self.folder / "trainings" / f"{name}-{end}"

    def is_finished(self, training: Training) -> bool:
        """Whether the training has ended."""
        return finished_weights(self.run_dir(training)) is not None

    def weights(self, source: Source, seed: int) -> Path | None:
        """The file that holds the weights; ``None`` where timm has them."""
        if source.trained:
            return finished_weights(self.run_dir(Training(source, seed)))
        checkpoint = source.net.get("checkpoint")
        return None if checkpoint is None else find_weights(str(checkpoint).replace("{seed}", str(seed)))

    def train_all(self, jobs: int, threads: int) -> None:
        """Trains what is not trained yet, several at a time, each after the one it starts from.

        Ctrl-C lets all of them save their state first; so does the failure of one.

        Args:
            jobs: How many at a time, at most.
            threads: CPU threads of all of them.

        Raises:
            CommandError: If one fails.
        """
        numbered = list(enumerate(self, 1))
        left = [(number, training) for number, training in numbered if not self.is_finished(training)]
        jobs = max(1, min(jobs, len(left)))
        group = Group(max(1, threads // jobs))
        running: set[Future[Path]] = set()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while left or running:
                    ready = [job for job in left if self._can_start(job[1])][: jobs - len(running)]
                    for job in ready:
                        number, training = job
                        left.remove(job)
                        print(f"[{number}/{len(numbered)}] training {training}", flush=True)
                        running.add(pool.submit(self.train, training, group, str(training) if jobs > 1 else ""))
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            except BaseException:
                self._stop(group, running)
                raise

    @staticmethod
    def _stop(group: Group, running: set[Future[Path]]) -> None:
        """Waits until all have saved and stopped; every further Ctrl-C is passed on to them."""
        while True:
            try:
                group.interrupt()
                wait(running)
                return
            except KeyboardInterrupt:
                continue

    def _can_start(self, training: Training) -> bool:
        links = list(training.source.chain())[:-1]
        return all(self.is_finished(Training(link, training.seed)) for link in links if link.trained)

    def train(self, training: Training, group: Group | None = None, label: str = "") -> Path:
        """Weights of a training, begun, resumed or finished long ago.

        Args:
            training: Which one.
            group: Trainings that run at the same time.
            label: Put before what it prints.

        Raises:
            CommandError: If it fails.
        """
        source, run = training.source, self.run_dir(training)
        path = self.folder / "configs" / f"{source.recipe}.yaml"
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(source.config, sort_keys=False))
        options = ["--config", str(path), f"--seed_everything={training.seed}"]
        if source.start is not None:
            options += ["--model.net.checkpoint", str(self.weights(source.start, training.seed))]
        return finish_training(run, options, group, label)
