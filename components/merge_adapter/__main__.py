from qlora_retrain.pipeline.step_main import Run, main


def load() -> Run:  # -> the step's run; imported only when there is work to do
    from components.merge_adapter.step import run

    return run


if __name__ == "__main__":
    main("merge_adapter", load)
