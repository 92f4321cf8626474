"""`linear_dpo_loss`: hidden states to a preference loss, without logits. The drop-in for a trainer.

It is `linear_logps` followed by `preference_loss`, and nothing else.
"""

from torch import Tensor

from .linear_logps import linear_logps
from .linear_logps_call import Lora
from .linear_logps_targets import NO_TARGET
from .preference_loss import PreferenceOutput, preference_loss


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_token_logps: Tensor | None = None,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> PreferenceOutput:
    """Returns the preference losses of `pairs` of responses, from the rows that predict them.

    In a batch of the usual layout (chosen rows before rejected ones, -100 around the responses):

        scored = labels[:, 1:] != -100  # [2P, L]
        targets = labels[:, 1:][scored]  # [N]
        cu_responses = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).int()  # [2P + 1]
        pairs = torch.arange(len(labels), device=labels.device).view(2, -1).T  # [P, 2]
        with torch.no_grad():
            hidden = ref_model.model(input_ids, attention_mask=mask).last_hidden_state[:, :-1]
            ref = linear_logps(hidden[scored], ref_model.lm_head.weight, targets)  # [N]
        hidden = model.model(input_ids, attention_mask=mask).last_hidden_state[:, :-1]
        out = linear_dpo_loss(hidden[scored], model.lm_head.weight, targets, cu_responses, pairs,
                              ref_token_logps=ref, beta=0.1)
        out.loss.backward()

    Stored beforehand, `ref` or its sums by response (as `ref_logps` [2P]) may go in instead. A head
    with a bias, a softcap or a scale takes it in both calls.

    Args:
        hidden: [N, D], the row that predicts each token of each response, one after the other.
        weight: [V, D], the LM head; its `bias` [V], an adapter on it (`lora`) and the logit
            transform as in `linear_logps`.
        targets: [N] int64, the tokens. All of them count: pass only the rows to be scored.
        cu_responses, pairs, ref_logps, ref_token_logps, beta, loss_type, label_smoothing: see
            `preference_loss`.
        impl, workspace_bytes: see `linear_logps`.

    Gradients flow to `hidden`, `weight`, `bias` and the adapter. Raises what those two raise.
    """
    token_logps = linear_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        lora=lora,
        softcap=softcap,
        scale=scale,
        temperature=temperature,
        ignore_index=NO_TARGET,
        impl=impl,
        workspace_bytes=workspace_bytes,
    )
    return preference_loss(
        token_logps,
        cu_responses,
        pairs,
        ref_token_logps,
        ref_logps,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        impl=impl,
    )
