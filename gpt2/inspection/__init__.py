"""Take the model apart: trace activations by TransformerLens' names, change them while the model runs, measure them."""

from gpt2.inspection.attention import (
    attention_entropy,
    attention_rollout,
    duplicate_token_scores,
    duplicate_tokens,
    head_scores,
    induction_scores,
    previous_token_scores,
    previous_tokens,
    repeated_tokens,
    tokens_after_duplicates,
)
from gpt2.inspection.attribution import LogitAttribution, logit_attribution, residual_norms
from gpt2.inspection.corpus import Excitement, most_exciting
from gpt2.inspection.effects import (
    EffectTable,
    ablate_each_head,
    ablate_each_layer,
    log_probability_of,
    logit_difference,
    logit_of,
    loss_on,
    patch_each,
)
from gpt2.inspection.gradients import TokenAttribution, gradient_times_input, integrated_gradients
from gpt2.inspection.intervention import (
    ablate_heads,
    ablate_layers,
    ablate_neurons,
    intervene,
    patch,
    replace_pattern,
    steer,
    token_mean,
)
from gpt2.inspection.lens import LensTable, TunedLens, lens_losses, lens_table, logit_lens, train_tuned_lens
from gpt2.inspection.names import activation_names, select_names
from gpt2.inspection.overviews import Overview, overview
from gpt2.inspection.page import html_page
from gpt2.inspection.taps import Site
from gpt2.inspection.tracing import Trace, join, record, trace

__all__ = [
    "EffectTable",
    "Excitement",
    "LensTable",
    "LogitAttribution",
    "Overview",
    "Site",
    "TokenAttribution",
    "Trace",
    "TunedLens",
    "ablate_each_head",
    "ablate_each_layer",
    "ablate_heads",
    "ablate_layers",
    "ablate_neurons",
    "activation_names",
    "attention_entropy",
    "attention_rollout",
    "duplicate_token_scores",
    "duplicate_tokens",
    "gradient_times_input",
    "head_scores",
    "html_page",
    "induction_scores",
    "integrated_gradients",
    "intervene",
    "join",
    "lens_losses",
    "lens_table",
    "log_probability_of",
    "logit_attribution",
    "logit_difference",
    "logit_lens",
    "logit_of",
    "loss_on",
    "most_exciting",
    "overview",
    "patch",
    "patch_each",
    "previous_token_scores",
    "previous_tokens",
    "record",
    "repeated_tokens",
    "replace_pattern",
    "residual_norms",
    "select_names",
    "steer",
    "token_mean",
    "tokens_after_duplicates",
    "trace",
    "train_tuned_lens",
]
