"""The study's small world is what its page says of it."""

import random
import re

import pytest


@pytest.fixture(scope="module")
def world(study):
    return study("world")


def right_steps(answer):
    """Of each step of an answer, whether it is right."""
    steps = re.findall(r"(\d+) ([+-]) (\d+) (?:=|makes) (\d+)", answer)
    return [int(a) + int(sign + b) == int(result) for a, sign, b, result in steps]


class TestWorld:
    def test_a_problems_text_holds_what_it_asks(self, world):
        """Worked out again from the sentences, as a reader would."""
        rng = random.Random(0)
        for _ in range(300):
            problem = world.make_problem(rng)
            thing = re.search(r"how many (\w+) \?", problem.question)[1]
            count = int(re.search(rf"has (\d+) {thing} ", problem.question)[1])
            for verb, amount in re.findall(r"then \w+ (\w+) (\d+) \.", problem.question):
                count += int(amount) if verb in world.GAINS else -int(amount)
                assert 0 <= count < 100
            assert count == problem.result

    @pytest.mark.parametrize("writer", ["careful", "brief"])
    def test_careful_and_brief_answers_are_right(self, world, writer):
        rng = random.Random(1)
        for _ in range(200):
            problem = world.make_problem(rng)
            answer = world.write_answer(problem, writer, rng)
            assert world.said_result(answer) == problem.result
            assert all(right_steps(answer))

    def test_a_pupils_steps_are_wrong_as_often_as_the_page_says(self, world):
        rng = random.Random(2)
        answers = [world.write_answer(world.make_problem(rng), "pupil", rng) for _ in range(2000)]
        steps = [step for answer in answers for step in right_steps(answer)]
        assert 1 - sum(steps) / len(steps) == pytest.approx(0.3, abs=0.02)

    def test_answers_survive_the_tokenizer(self, world):
        tokenizer, rng = world.make_tokenizer(), random.Random(3)
        for _ in range(100):
            problem = world.make_problem(rng)
            ids = tokenizer(f"{problem.question} answer : {world.write_answer(problem, 'careful', rng)}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert world.said_result(tokenizer.decode(ids)) == problem.result
