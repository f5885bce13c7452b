from qlora_retrain.pipeline.step_main import Run, main


def load() -> Run:
    from components.publish.step import run

    return run


if __name__ == "__main__":
    main("publish", load)
