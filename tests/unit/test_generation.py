from ftb_llm.generation import WorkList, group_id, group_number


def test_numbers_are_handed_out_in_order():
    work = WorkList()
    assert [work.take() for _ in range(3)] == [0, 1, 2]


def test_a_number_that_came_to_nothing_is_next():
    work = WorkList()
    taken = [work.take() for _ in range(4)]
    work.put_back(taken[2])
    work.put_back(taken[1])
    assert [work.take() for _ in range(3)] == [1, 2, 4]


def test_a_resumed_list_hands_out_the_gaps_first():
    work = WorkList([0, 1, 3, 6])
    assert [work.take() for _ in range(5)] == [2, 4, 5, 7, 8]


def test_numbers_and_identifiers_match():
    assert group_number(group_id(1234)) == 1234
