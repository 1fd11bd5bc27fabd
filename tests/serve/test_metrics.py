from prometheus_client.parser import text_string_to_metric_families

from densedino.serve.metrics import Metrics


def samples(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_prometheus_reads_what_was_counted():
    metrics = Metrics()
    metrics.answered("/v1/features", 200, 0.02)
    metrics.answered("/v1/features", 429, 0.001)
    metrics.ran(4, 0.5)
    metrics.ran(1, 0.25)
    metrics.decoder_replaced()
    metrics.watch("waiting_images", "…", lambda: 7)
    found = samples(metrics)
    assert found["densedino_requests_total", (("route", "/v1/features"), ("status", "429"))] == 1
    assert found["densedino_batch_images_sum", ()] == 5 and found["densedino_batch_images_count", ()] == 2
    assert found["densedino_model_seconds_total", ()] == 0.75
    assert found["densedino_decoders_replaced_total", ()] == 1 and found["densedino_waiting_images", ()] == 7


def test_two_servers_of_a_process_do_not_mix():
    one, other = Metrics(), Metrics()
    one.ran(3, 1.0)
    assert samples(other)["densedino_batch_images_count", ()] == 0
