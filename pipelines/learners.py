"""Which learner a recipe needs."""

from __future__ import annotations

from pipelines.detector_learner import BoxLearning
from pipelines.learner import Learning
from pipelines.study import Study, Team
from pipelines.training_job import Job
from tsm_core.detector_recipes import DetectorRecipe


def new_study(job: Job, team: Team) -> Study:
    """One process's part of the job's training, of whatever kind its recipe is."""
    return BoxLearning(job, team) if isinstance(job.recipe, DetectorRecipe) else Learning(job, team)
