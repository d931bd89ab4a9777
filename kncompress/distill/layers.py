"""Which teacher layer each student layer learns from."""


def layer_mapping(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Teacher layer for each student layer, counted from 0.

    The identity at equal depth; otherwise evenly spread, first and last layer kept, halves rounded up.
    12 -> 6 gives (0, 2, 4, 7, 9, 11), the layers of DistilGPT2. A student of one layer gets the last one.

    Raises:
        ValueError: a count below 1, or a student deeper than its teacher.
    """
    if student_layers < 1 or student_layers > teacher_layers:
        raise ValueError(
            f"student_layers={student_layers}: must lie between 1 and the teacher's {teacher_layers} layers"
        )
    if student_layers == 1:
        return (teacher_layers - 1,)
    gaps = student_layers - 1
    # Whole numbers throughout: round() rounds halves to even, which would spread the layers unevenly.
    return tuple((2 * i * (teacher_layers - 1) + gaps) // (2 * gaps) for i in range(student_layers))
