from qlora_retrain.pipeline.step_main import Run, main


def load() -> Run:  # -> the step's run; imported only when there is work to do
    from components.evaluate.step import run

    return run


if __name__ == "__main__":
    main("evaluate", load)
