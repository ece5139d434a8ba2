"""A simulation of programs that wait for each other: does each of them end?"""

from collections import defaultdict


def steps_left(programs):
    """Return how many steps are left when no program can go on any more.

    A step can be taken when as many steps with its key have been taken as its rank says. Which of several programs goes
    on first makes no difference: what can be taken stays so, as nobody else takes a step with the same key before.

    Args:
        programs: the steps of each in their order, as pairs of a key and a rank.
    """
    taken, waiting = defaultdict(int), defaultdict(list)
    left = sum(map(len, programs))
    ready = [(steps, next(steps, None)) for steps in map(iter, programs)]
    while ready:
        steps, step = ready.pop()
        while step is not None and taken[step[0]] == step[1]:
            key = step[0]
            taken[key] += 1
            left -= 1
            ready += waiting.pop((key, taken[key]), [])
            step = next(steps, None)
        if step is not None:
            waiting[step].append((steps, step))
    return left
