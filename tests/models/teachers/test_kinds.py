"""Other kinds of rerankers as teachers, compared with `transformers` run on hand-built inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

from d2llm.core.errors import AnswerTokenError, InputError, ModelError, ModelNotFoundError
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingPair
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.classifier import ClassifierTeacher
from d2llm.models.teachers.identity import find_kind
from d2llm.models.teachers.pair_teacher import PairTeacher, identify_teacher, load_teacher
from d2llm.models.teachers.prompts import load_prompt
from d2llm.models.teachers.seq2seq import Seq2SeqTeacher
from d2llm.recipe import TeacherConfig, TeacherTuningConfig
from d2llm.training.label import label
from d2llm.training.tune_teacher import accumulate, tune_teacher
from tiny_data import topics
from tiny_models import TEXTS, tiny_tokenizer, write_tiny_model

LONG = " ".join(TEXTS)
PAIRS = [(query, passage) for query in ("the cat", TEXTS[5] + "?", "a dog runs") for passage in (*TEXTS[:4], "dog")]
TINY = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "modernbert": ("ModernBertForSequenceClassification", {"cls_token_id": 1, "sep_token_id": 2}),
}
NLI = {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}}


def load(folder: Path, **settings: object) -> PairTeacher:
    return load_teacher(config(folder, **settings), device="cpu", dtype="float32")


def config(folder: Path, **settings: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": str(folder), "max_tokens": 300} | settings)


def write_classifier(folder: Path, architecture: str, **settings: Any) -> Path:
    name, architecture_settings = CLASSIFIERS[architecture]
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(
            model_class.config_class(**(TINY | architecture_settings | {"num_labels": 1} | settings))
        ).save_pretrained(folder)
    tokenizer = tiny_tokenizer(is_decoder=False)
    has_token_types = architecture == "bert"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", *(["token_type_ids"] if has_token_types else []), "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def words_tokenizer() -> Fast:
    """Splits words at spaces and closes a text with </s>, like T5's tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS * 3, *["Query: Document: Relevant: true false yes no"] * 9], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return Fast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"), initializer_factor=3.0)


def write_t5(folder: Path, **settings: Any) -> Path:
    t5_config = transformers.T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(t5_config).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.add_tokens(["yes", "no"])  # one token each when nothing precedes them
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole.save_pretrained(folder)
    return folder


# --- against transformers


def test_qwen3_reranker_matches_transformers(qwen3: Path) -> None:
    """As published: the chat prefix and suffix around the body, and the logits of yes and no at the last position."""
    teacher = load(qwen3, prompt="qwen3-reranker")
    assert isinstance(teacher, CausalTeacher)
    tokenizer = teacher.tokenizer
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    instruct = "Given a web search query, retrieve relevant passages that answer the query"
    model = AutoModelForCausalLM.from_pretrained(qwen3).eval()
    yes, no = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    expected = []
    for query, passage in PAIRS:
        body = f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {passage}"
        ids = [i for part in (before, body, after) for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        expected.append(float(logits[yes] - logits[no]))
    scores = teacher.score_pairs(PAIRS, "asymmetric", with_features=True)
    np.testing.assert_allclose(scores.log_odds, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1
    assert scores.features is not None
    assert teacher.why_not_shared() == ""


def test_monot5_matches_transformers(t5: Path) -> None:
    teacher = load(t5, prompt="monot5")
    assert isinstance(teacher, Seq2SeqTeacher)
    expected, features = answers(AutoModelForSeq2SeqLM.from_pretrained(t5), teacher.tokenizer, PAIRS)
    scores = teacher.score_pairs(PAIRS, "asymmetric", with_features=True)
    np.testing.assert_allclose(scores.log_odds, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.features, features, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected) > 0.1


def answers(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Log-odds and decoder states of MonoT5, by transformers alone."""
    (true,), (false,) = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("true", "false"))
    expected, features = [], []
    for query, passage in pairs:
        inputs = tokenizer(f"Query: {query} Document: {passage} Relevant:", return_tensors="pt")
        with torch.inference_mode():
            output = model.eval()(
                input_ids=inputs["input_ids"], decoder_input_ids=torch.tensor([[0]]), output_hidden_states=True
            )
        expected.append(float(output.logits[0, 0, true] - output.logits[0, 0, false]))
        features.append(output.decoder_hidden_states[-1][0, 0].numpy())
    return expected, np.stack(features)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_learns_by_the_softmax_of_rankt5(tmp_path: Path, tuning: str, tied: bool) -> None:
    """Its loss by hand; then one that falls, and a tuned model that transformers can read."""
    folder = write_t5(tmp_path / "model", tie_word_embeddings=tied)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    settings = {"tuning": tuning, "loss": "lists", "pair_weight": 0.0, "num_negatives": 2, "batch_pairs": 12}
    settings |= {"lora": {"dropout": 0.0}, "epochs": 6, "learning_rate": 3e-2 if tuning == "lora" else 1e-2}
    tuning_config = TeacherTuningConfig.model_validate(settings)
    teacher: Any = load(folder, prompt="monot5")
    teacher.prepare_training(tuning_config.lora, tuning="full")
    pairs = [TrainingPair(*pair, "symmetric", float(index in (1, 7))) for index, pair in enumerate(PAIRS[:10])]
    before = np.array(answers(model, words_tokenizer(), PAIRS)[0])
    expected = [np.logaddexp.reduce(before[:5]) - before[1], np.logaddexp.reduce(before[5:10]) - before[7]]
    assert float(accumulate(teacher.eval(), pairs, 512, tuning_config)[0]) == pytest.approx(np.mean(expected), rel=1e-4)
    report = tune_teacher(
        [topics(num_train=20)],
        tmp_path / "tuned",
        teacher=config(folder, prompt="monot5"),
        tuning=tuning_config,
        device="cpu",
        dtype="float32",
    )
    log = (tmp_path / "tuned.run" / "log.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, log) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    tuned = load(tmp_path / "tuned")
    assert tuned.fingerprint == report.fingerprint
    if tuning == "full":
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "tuned")
    else:
        adapter = load_file(tmp_path / "tuned" / "adapter.safetensors")
        assert not [name for name in adapter if "lm_head" in name or "shared" in name]
        for name in {name.rpartition(".")[0] for name in adapter}:
            model.get_submodule(name).weight.data += adapter[f"{name}.lora_up"] @ adapter[f"{name}.lora_down"]
    after, _ = answers(model, words_tokenizer(), PAIRS)
    np.testing.assert_allclose(tuned.score_pairs(PAIRS, "asymmetric").log_odds, after, rtol=1e-4, atol=1e-4)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_classifiers_match_transformers(tmp_path: Path, architecture: str, labels: int) -> None:
    names = (
        {}
        if labels == 1
        else {"id2label": {0: "entailment", 1: "other", 2: "third"} if labels == 3 else {0: "no", 1: "Entailment"}}
    )
    folder = write_classifier(tmp_path, architecture, num_labels=labels, **names)
    teacher = load(folder, kind="classifier", positive_label=None if labels == 1 else "entailment")
    assert isinstance(teacher, ClassifierTeacher)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for query, passage in PAIRS:
        with torch.inference_mode():
            logits = model(**teacher.tokenizer(query, passage, return_tensors="pt")).logits[0].double().numpy()
        positive = np.exp(logits) / np.exp(logits).sum()
        chosen = positive[0 if labels == 3 else 1] if labels > 1 else None
        expected.append(logits[0] if chosen is None else np.log(chosen / (1 - chosen)))
    scores = teacher.score_pairs(PAIRS, "asymmetric", with_features=True)
    np.testing.assert_allclose(scores.log_odds, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.01
    assert scores.features is not None
    assert scores.features.shape == (len(PAIRS), 32)
    assert np.ptp(scores.features, axis=0).max() > 0.01


def test_a_classifier_that_pools_later_has_no_features(tmp_path: Path) -> None:
    """A decoder scores every token and takes the score of the last one."""
    model_class = transformers.Qwen3ForSequenceClassification
    settings = model_class.config_class(**TINY, num_labels=1, num_key_value_heads=2, head_dim=8)
    model_class(settings).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scores = load(tmp_path).score_pairs(PAIRS, "symmetric", with_features=True)
    assert scores.features is None
    assert np.isfinite(scores.log_odds).all()


def test_a_decoder_without_a_padding_id_scores_the_last_token(tmp_path: Path) -> None:
    model_class = transformers.LlamaForSequenceClassification
    settings = model_class.config_class(**TINY | {"pad_token_id": None}, num_labels=1)
    model = model_class(settings).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    teacher = load(tmp_path)
    assert isinstance(teacher, ClassifierTeacher)
    for pairs in (PAIRS[:1], PAIRS[:4]):  # a batch of one would take the last position, which is padding
        with torch.inference_mode():
            rows = [teacher.tokenizer(*pair, return_tensors="pt") for pair in pairs]
            expected = [float(model(**row).logits[0, 0]) for row in rows]
        np.testing.assert_allclose(teacher.score_pairs(pairs, "symmetric").log_odds, expected, atol=1e-4)


# --- length


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_long_pairs_are_truncated_and_counted(tmp_path: Path, t5: Path, kind: str) -> None:
    folder = t5 if kind == "t5" else write_classifier(tmp_path, "bert")
    settings = {"prompt": "monot5"} if kind == "t5" else {}
    teacher: Any = load(folder, max_tokens=40, **settings)
    unlimited: Any = load(folder, **settings)
    pairs = [("the cat", LONG), (LONG, LONG), (LONG, "dog"), ("the cat", "dog")]
    rows, num_truncated = teacher.tokenize(pairs, "asymmetric")
    full_rows, num_truncated_unlimited = unlimited.tokenize(pairs, "asymmetric")
    assert (num_truncated, num_truncated_unlimited) == (3, 0)
    assert rows[3] == full_rows[3]
    assert all(36 <= len(row) <= 40 for row in rows[:3])
    first_cut = next(position for position in range(40) if rows[0][position] != full_rows[0][position])
    tail = len(rows[0]) - first_cut
    assert rows[0][first_cut:] == full_rows[0][-tail:]  # everything after the passage is kept
    assert tail <= 8
    teacher.config = teacher.config.model_copy(update={"max_tokens": 4})
    with pytest.raises(InputError, match=r"prompt and special tokens alone take \d+; raise max_tokens"):
        teacher.tokenize(pairs, "asymmetric")


# --- kinds and refusals


def test_kinds_are_found_and_identified(tmp_path: Path, t5: Path, qwen3: Path) -> None:
    bert = write_classifier(tmp_path / "bert", "bert", num_labels=3, **NLI)
    cases = [
        (config(t5, prompt="monot5"), "seq2seq"),
        (config(qwen3, prompt="qwen3-reranker"), "causal"),
        (config(bert, kind="classifier", positive_label="entailment"), "classifier"),
    ]
    for teacher_config, kind in cases:
        assert find_kind(teacher_config) == kind
        identity, teacher = (
            identify_teacher(teacher_config),
            load_teacher(teacher_config, device="cpu", dtype="float32"),
        )
        assert identity.fingerprint == teacher.fingerprint
        assert all(identity.prompts[task] == teacher.prompt_fingerprint(task) for task in identity.prompts)
    other = identify_teacher(config(bert, kind="classifier", positive_label="contradiction"))
    assert other.fingerprint == identify_teacher(cases[2][0]).fingerprint
    assert other.prompts != identify_teacher(cases[2][0]).prompts


def test_unusable_teachers_are_rejected(tmp_path: Path, t5: Path) -> None:
    bert = write_classifier(tmp_path / "bert", "bert", num_labels=3, **NLI)
    with pytest.raises(ModelError, match=r"classes entailment, neutral, contradiction; set .*positive_label .*None"):
        load(bert)
    with pytest.raises(ModelError, match="'yes'"):
        load(bert, kind="classifier", positive_label="yes")
    with pytest.raises(ModelError, match="has one output and no classes"):
        load(write_classifier(tmp_path / "one", "bert"), kind="classifier", positive_label="yes")
    path = tmp_path / "own.toml"
    for yes, problem in (("absolutely", "is not one token"), ("no", "'no' and 'no' are the same token")):
        section = f'template = "Q {{query}} P {{passage}} ?"\nyes = "{yes}"\nno = "no"\n'
        path.write_text(f"[symmetric]\n{section}[asymmetric]\n{section}")
        with pytest.raises(AnswerTokenError, match=problem):
            load(t5, prompt=str(path))


def test_spaced_templates_are_checked(tmp_path: Path) -> None:
    prompt = load_prompt("monot5", "asymmetric")
    assert prompt.fill("q", "p") == "Query: q Document: p Relevant:"
    assert (prompt.yes, prompt.no) == ("true", "false")
    path = tmp_path / "own.toml"
    path.write_text('[symmetric]\ntemplate = "Q:{query} P: {passage} ?"\nyes = "a"\nno = "b"\nspaced = true')
    with pytest.raises(InputError, match=r"a space must come before \{query\} and before"):
        load_prompt(str(path), "symmetric")
    path.write_text(path.read_text().replace("true", '"yes"'))
    with pytest.raises(InputError, match="spaced must be true or false"):
        load_prompt(str(path), "symmetric")


# --- labelling with them


@pytest.mark.parametrize("kind", ["t5", "bert", "decoder"])
def test_finished_labels_are_reused_with_or_without_features(tmp_path: Path, t5: Path, kind: str) -> None:
    folder, settings = t5, {"prompt": "monot5"}
    if kind == "bert":
        folder, settings = write_classifier(tmp_path / "model", "bert"), {}
    elif kind == "decoder":  # without features
        model_class = transformers.Qwen3ForSequenceClassification
        model_class(model_class.config_class(**TINY, num_labels=1, num_key_value_heads=2, head_dim=8)).save_pretrained(
            tmp_path / "model"
        )
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        folder, settings = tmp_path / "model", {}
    source = topics(num_train=5)
    teacher_config = config(folder, **settings)
    options: dict[str, Any] = {"teacher": teacher_config, "device": "cpu", "dtype": "float32"}
    first = label([source], tmp_path / "store", **options)
    assert first.queries == 5
    second = label([source], tmp_path / "store", **options)
    assert (second.queries, second.pairs, second.finished_queries) == (0, 0, 5)
    identity = identify_teacher(teacher_config)
    store = LabelStore.open_for_reading(
        tmp_path / "store", teacher=identity.fingerprint, prompt=identity.prompts[source.task], dataset="tiny"
    )
    entry = source.plan.entries[0]
    gram = store.gram(entry.query_id)
    assert (gram is None) == (kind == "decoder")
    scores = load(folder, **settings).score_pairs(
        [(source.query_text(entry.query_id), source.passage_text(p)) for p in entry.passage_ids], source.task
    )
    np.testing.assert_allclose(list(store.log_odds(entry.query_id).values()), scores.log_odds, rtol=0, atol=1e-4)


def test_a_classifier_whose_pooler_would_be_random_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "bert", "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="lacks 2 of the weights of a BertForSequenceClassification"):
        load(folder)
