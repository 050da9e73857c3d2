import pytest

from planner.cluster import load_cluster
from planner.defaults import Fixed, complete
from planner.explain import explain_memory, kept_terms
from planner.memory import layer_needs
from planner.model import load_model
from planner.plan import Training
from planner.shapes import shape_of


@pytest.mark.parametrize("model", ["gpt3-6.7b", "llama-3-8b", "qwen3-0.6b", "gemma-2-2b"])
@pytest.mark.parametrize("level", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_the_terms_add_up(model: str, level: str, sequence_parallel: bool, attention: str) -> None:
    spec = load_model(model)
    training = Training(global_batch_size=1, sequence_length=2048, attention=attention)  # type: ignore[arg-type]
    fixed = Fixed(tensor_parallel=4, pipeline_parallel=2, recompute=level, sequence_parallel=sequence_parallel)  # type: ignore[arg-type]
    completed = complete(spec, load_cluster("a100-80gb:16"), training, fixed, batch_given=False)
    shape = shape_of(completed.inputs, completed.decisions)
    kept = layer_needs(completed.inputs, completed.decisions, "block", level).kept  # type: ignore[arg-type]
    assert sum(term.size for term in kept_terms(shape, level)) == kept  # type: ignore[arg-type]
    *parts, total = [term for term in explain_memory(completed.inputs, completed.decisions) if not term.name.startswith("  ")]
    assert sum(term.size for term in parts) == total.size


def test_each_term_says_bytes_per_token_and_why() -> None:
    """GPT-3 6.7B: h 4,096, 32 heads, s 2,048; one token's probabilities are a·s·2 bytes."""
    spec = load_model("gpt3-6.7b")
    training = Training(global_batch_size=1, sequence_length=2048, attention="unfused")
    completed = complete(spec, load_cluster("a100-80gb:4"), training, Fixed(tensor_parallel=4, recompute="none"), batch_given=False)
    terms = {term.name: term for term in kept_terms(shape_of(completed.inputs, completed.decisions), "none")}
    assert f"{32 * 2048 * 2 // 4:,} B a token" in terms["attention's probabilities"].formula
    assert f"{4096 * 2:,} B a token" in terms["block input"].formula
    assert all(term.why and term.unit for term in terms.values())
