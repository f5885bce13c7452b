"""Run the step: `python -m components.publish --plan URI`."""

from qlora_retrain.pipeline.step_main import StepFunction, main


def load() -> StepFunction:
    """Return the step's `run`. Its imports take seconds, so they are made only when there is work to do."""
    from components.publish.step import run

    return run


if __name__ == "__main__":
    main("publish", load)
