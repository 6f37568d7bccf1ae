"""What /metrics shows."""

import prometheus_client


class Metrics:
  """What /metrics shows; a registry per application."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'dmdd_requests', 'Answers by status.', ['status'], registry=self.registry
    )
    self.verdicts = prometheus_client.Counter(
      'dmdd_verdicts',
      'Inspected images.',
      ['category', 'verdict'],
      registry=self.registry,
    )
    self.seconds = prometheus_client.Histogram(
      'dmdd_request_seconds',
      'From the request to its answer, refused ones too.',
      registry=self.registry,
    )
    self.batches = prometheus_client.Histogram(
      'dmdd_batch_images',
      'Images per call of the device.',
      buckets=(1, 2, 4, 8, 16, 32, 64),
      registry=self.registry,
    )
    prometheus_client.ProcessCollector(registry=self.registry)
    self.waiting = prometheus_client.Gauge(
      'dmdd_waiting_requests', 'Not answered yet.', registry=self.registry
    )
