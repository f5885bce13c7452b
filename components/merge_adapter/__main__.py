"""Run the step: `python -m components.merge_adapter --plan URI`."""

from qlora_retrain.pipeline.step_main import StepFunction, main


def load() -> StepFunction:
    """Return the step's `run`. Its imports take seconds, so they are made only when there is work to do."""
    from components.merge_adapter.step import run

    return run


if __name__ == "__main__":
    main("merge_adapter", load)
