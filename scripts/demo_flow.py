"""The flow of scripts/demo: a parameter, two tasks, a few log lines."""

from prefect import flow, get_run_logger, task


@task
def greet(name: str) -> str:
    return f"Hello, {name}!"


@task
def count_letters(text: str) -> int:
    return sum(letter.isalpha() for letter in text)


@flow(log_prints=True)
def hello(name: str = "you") -> int:
    greeting = greet(name)
    get_run_logger().info(greeting)
    letters = count_letters(greeting)
    print(f"That is {letters} letters.")
    return letters
