"""Which learner a recipe needs."""

from __future__ import annotations

from pipelines.learner import Learning
from pipelines.study import Study, Team
from pipelines.training_job import Job


def new_study(job: Job, team: Team) -> Study:
    """One process's part of the job's training, of whatever kind its recipe is."""
    return Learning(job, team)
