"""The 29 defects that were measured in NeuroMANCER 1.5.6's trainers, in our words, and the tests that exclude each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIT, BASE, REAL = "test_littrainer.py", "test_neuromancer_trainer.py", "test_neuromancer.py"

# number: (what happens there, the tests that would fail if it happened here)
DEFECTS: dict[int, tuple[str, tuple[str, ...]]] = {
    # ------------------------------------------------------------------ LitTrainer, LitProblem, LitDataModule
    1: (
        "The optimizer given as custom_optimizer is kept but never used; Adam trains instead.",
        (f"{LIT}::test_the_given_optimizer_is_used",),
    ),
    2: (
        "automatic_optimization=False does not reach the module, so a step cannot do its own backward.",
        (f"{LIT}::test_a_step_may_take_care_of_gradients_itself",),
    ),
    3: (
        "A custom step that returns nothing fails in logging, with an error that does not say so.",
        (
            f"{LIT}::test_a_step_may_take_care_of_gradients_itself",
            f"{LIT}::test_a_step_that_returns_nothing_or_takes_the_wrong_arguments_is_told_how",
        ),
    ),
    4: (
        "At the end the problem and get_weights() hold the last weights, not the best.",
        (f"{LIT}::test_the_best_weights_are_in_the_problem_at_the_end",),
    ),
    5: (
        "A problem that differentiates in its forward pass fails in validation, grad_inference or not.",
        (
            f"{LIT}::test_a_tutorial_trains_that_the_original_cannot_run_or_cannot_save",
            f"{REAL}::test_a_pinn_is_evaluated_with_gradients_only_because_it_asks_for_them",
        ),
    ),
    6: (
        "Batches lack the epoch that its own augmented Lagrangian loss reads.",
        (f"{LIT}::test_the_augmented_lagrangian_of_neuromancer_gets_epoch_and_rows",),
    ),
    7: (
        "Without dev data no weights are saved, without a word; with patience it crashes.",
        (f"{LIT}::test_without_dev_data_the_training_loss_decides_and_the_weights_are_saved",),
    ),
    8: (
        "Only two metric names work, and every value is logged under these two names.",
        (
            f"{LIT}::test_the_metric_that_decides_may_have_either_name",
            f"{LIT}::test_other_losses_are_trained_on_and_reported_under_their_own_names",
        ),
    ),
    9: (
        "Training data is never shuffled.",
        (f"{LIT}::test_training_rows_are_shuffled_unless_asked_otherwise",),
    ),
    10: (
        "Logging cannot be switched off: logger=False and None log to TensorBoard.",
        (f"{LIT}::test_without_weights_and_logger_nothing_is_written",),
    ),
    11: (
        "save_weights=False still writes checkpoints.",
        (f"{LIT}::test_without_weights_and_logger_nothing_is_written",),
    ),
    12: (
        "A run cannot be resumed; ckpt_path ends up in the data setup function.",
        (f"{LIT}::test_a_second_fit_goes_on_and_a_run_can_be_resumed",),
    ),
    13: (
        "Hooks with Lightning's signature are refused or crash, annotations too; misspelt names are accepted.",
        (
            f"{LIT}::test_the_table_of_hooks_is_lightnings",
            f"{LIT}::test_a_wrong_hook_is_an_error_that_shows_the_right_one",
            f"{LIT}::test_annotations_and_argument_names_are_free",
            f"{LIT}::test_hooks_are_called_in_the_order_of_lightning",
        ),
    ),
    14: (
        "The lists of step outputs keep every graph alive, and one of them is never emptied.",
        (f"{LIT}::test_step_outputs_are_detached_and_start_anew_with_each_epoch",),
    ),
    15: (
        "During warm-up its early stopping takes back what others asked for: training does not stop.",
        (f"{LIT}::test_a_stop_asked_for_during_the_warmup_holds",),
    ),
    16: (
        "patience=0 means none, and most options of the trainer underneath cannot be given.",
        (
            f"{LIT}::test_patience_counts_after_the_warmup",
            f"{LIT}::test_options_of_weft_are_taken_as_well",
            f"{LIT}::test_an_unknown_keyword_and_two_names_for_one_option_raise",
        ),
    ),
    17: (
        "Test data cannot be used.",
        (f"{LIT}::test_the_test_set_is_used_and_can_be_monitored",),
    ),
    18: (
        "A dataset under another name ends the process, with the names in the message swapped.",
        (f"{LIT}::test_a_dataset_of_another_name_is_an_error_and_no_exit",),
    ),
    19: (
        "Hooks for configure_optimizers and validation_step lose their result or hit a typing error.",
        (
            f"{LIT}::test_a_validation_step_and_a_backward_of_ones_own",
            f"{LIT}::test_what_configure_optimizers_may_return",
        ),
    ),
    20: (
        "The data setup function runs again for each stage and in each process: other data every time.",
        (
            f"{LIT}::test_keyword_arguments_go_to_the_data_setup_function_which_runs_once",
            "test_data.py::test_with_a_seed_the_data_does_not_depend_on_the_users_random_state_nor_change_it",
        ),
    ),
    21: (
        "The README names a keyword that does not exist and other defaults than the code has.",
        (
            f"{LIT}::test_the_signature_holds_every_keyword_of_the_original_and_of_its_readme",
            f"{LIT}::test_the_default_optimizer_is_the_one_of_the_readme",
        ),
    ),
    22: (
        "Each process monitors its own numbers, all devices are taken unasked, sweeps need attributes and wandb.",
        (
            f"{LIT}::test_two_processes_end_where_one_does",
            f"{LIT}::test_the_signature_holds_every_keyword_of_the_original_and_of_its_readme",
            f"{LIT}::test_a_sweeps_learning_rate_and_batch_size_are_honoured",
            f"{LIT}::test_the_weights_file_is_named_as_asked_and_holds_the_best",
            "test_peer_defects.py::test_the_integrations_import_none_of_the_packages_that_they_stand_in_for",
        ),
    ),
    # ------------------------------------------------------------------------------------------ the base Trainer
    23: (
        "Best weights and early stopping go by the last dev batch instead of all of them.",
        (f"{BASE}::test_the_best_weights_are_those_of_the_mean_over_all_dev_batches",),
    ),
    24: (
        "Without dev or test data it crashes, in training and in test().",
        (f"{BASE}::test_without_dev_data_the_training_loss_decides_and_test_leaves_out_what_is_missing",),
    ),
    25: (
        "Optimizers that need a closure fail, and clipping cannot be switched off.",
        (f"{BASE}::test_lbfgs_trains", f"{BASE}::test_clipping_can_be_switched_off"),
    ),
    26: (
        "An interrupt in the first epoch crashes; after an early stop another training ends after one epoch.",
        (
            f"{BASE}::test_an_interrupt_ends_training_and_returns_the_best_weights",
            f"{BASE}::test_after_an_early_stop_training_goes_on_with_full_patience",
        ),
    ),
    27: (
        "A negative metric to be maximised never improves.",
        (f"{BASE}::test_a_negative_metric_can_be_maximised",),
    ),
    28: (
        "Buffers of the augmented Lagrangian loss change their size, so its weights do not fit a fresh problem.",
        (f"{REAL}::test_neuromancers_augmented_lagrangian_trains_on_one_full_batch_and_updates_once_an_epoch",),
    ),
    29: (
        "The model stays when batches go to a device, graphs live too long, NaN goes on; no accumulating, no resume.",
        (
            "test_neuromancer_gpu.py::test_the_problem_goes_where_its_batches_go",
            f"{BASE}::test_no_graph_outlives_its_step",
            f"{BASE}::test_a_loss_that_is_not_finite_stops_before_the_step",
            f"{BASE}::test_multi_fidelity_adds_the_alpha_losses_of_the_nodes",
            "test_parity.py::test_accumulating_micro_batches_equals_one_big_batch",
            "test_parity.py::test_a_scheduler_steps_as_in_a_loop_by_hand",
            f"{LIT}::test_a_second_fit_goes_on_and_a_run_can_be_resumed",
        ),
    ),
}


def names_of_tests(path: Path) -> set[str]:
    """The names of the test functions of a file."""
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(tests: tuple[str, ...]) -> list[str]:
    """Those of `file::name` that are not there."""
    split = [(test, *test.split("::")) for test in tests]
    places = {path.name: path for path in Path(__file__).parents[2].rglob("test_*.py")}
    return [t for t, file, name in split if file not in places or name not in names_of_tests(places[file])]


def test_every_defect_is_there_once() -> None:
    assert list(DEFECTS) == list(range(1, 30))


@pytest.mark.parametrize("number", DEFECTS)
def test_a_defect_of_a_peer_is_excluded_by_a_test(number: int) -> None:
    what, tests = DEFECTS[number]
    assert what and tests and not missing(tests), f"{what} Not there: {missing(tests)}"


def test_the_check_of_names_can_fail() -> None:
    absent = (f"{LIT}::test_nothing_of_the_kind", "test_none.py::test_every_defect_is_there_once")
    assert missing(absent) == list(absent)


def test_the_integrations_import_none_of_the_packages_that_they_stand_in_for() -> None:
    code = (
        "import sys, weft\n"
        "weft.LitTrainer(), weft.integrations.neuromancer.Trainer\n"
        "print([name for name in ('neuromancer', 'wandb', 'mlflow', 'lightning.pytorch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
