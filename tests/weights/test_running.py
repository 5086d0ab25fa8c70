"""What can be added but not run is refused before long work, not in the middle of it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint
from palinode.weights.folders import require_causal_lm


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_refused_where_a_model_has_to_run(models):
    folder = models.place / "dcp"
    dcp.save({"model.norm.weight": torch.ones(4)}, checkpoint_id=str(folder), no_dist=True)
    with pytest.raises(CheckpointError, match="can be added, but not run or trained as it is; write it "):
        require_causal_lm(Checkpoint.open(folder, allow_pickle=True))


def test_a_file_that_was_named_by_itself_is_refused_too(models):
    torch.save({"model.norm.weight": torch.ones(4)}, models.place / "weights.pt")
    (models.place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match=r"weights\.pt can be added, but not run"):
        require_causal_lm(Checkpoint.open(models.place / "weights.pt", allow_pickle=True))
