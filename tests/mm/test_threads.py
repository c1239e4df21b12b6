"""One model serves several threads, with or without gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.mm.test_padding import batch, images, model_of, same_result

SIZES = [(32, 32), (32, 48), (48, 32), (64, 64)]


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_four_threads_get_their_own_images_results(kind):
    model = model_of(kind)
    parts = images(SIZES)

    @torch.inference_mode()  # of the thread
    def predict(number):
        return model.test_step(batch(kind, [parts[number % len(SIZES)]]))[0]

    alone = [predict(number) for number in range(len(SIZES))]
    assert len({sample.metainfo["scope"]["size"] for sample in alone}) == len(SIZES)
    with ThreadPoolExecutor(4) as pool:
        for number, result in enumerate(pool.map(predict, range(160))):
            same_result(kind, alone[number % len(SIZES)], result)


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_predictions_outside_no_grad(kind):
    model = model_of(kind)
    parts = images([(32, 48)])
    with torch.no_grad():
        [expected] = model.test_step(batch(kind, parts))
    [result] = model.test_step(batch(kind, parts))
    fact = result.metainfo["scope"]
    assert fact["presence"].shape == (model.num_classes,)
    for name, value in expected.metainfo["scope"].items():
        assert torch.equal(torch.as_tensor(fact[name]), torch.as_tensor(value)), name
