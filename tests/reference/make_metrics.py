"""Makes metrics.json: what torch-fidelity 0.4.0 says about the features of `tests/metrics_cases.features`.

pip install torch==2.13.0 && pip install --no-deps torch-fidelity==0.4.0
python tests/reference/make_metrics.py
"""

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
    from make_features import stand_in_for_torchvision
    from metrics_cases import features

    stand_in_for_torchvision()
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    real, generated = (torch.from_numpy(x).double() for x in features())
    logits = torch.from_numpy(features(seed=5, dimension=10)[0])
    moments = [metric_fid.fid_features_to_statistics(x) for x in (generated, real)]
    found = metric_fid.fid_statistics_to_metric(*moments, verbose=False)
    found |= metric_kid.kid_features_to_metric(generated, real, kid_subset_size=300, verbose=False)
    found |= metric_isc.isc_features_to_metric(3 * logits)
    found |= metric_prc.prc_features_to_metric(generated, real, verbose=False)
    Path(__file__).with_name("metrics.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
