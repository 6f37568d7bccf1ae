"""TensorFlow Datasets builders, one package a data set, one config a category.

Everything is read from what the user has, in `manual_dir`: an unpacked folder,
or the archive itself. No address is built in. To train, no builder is needed:
`data.name` reads the same folders in place.

Synopsis:

  from dmdd_jax.data.builders.btad import btad_dataset_builder
  builder = btad_dataset_builder.Builder(config='01', data_dir='data/tfds')
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir='data/BTAD')
  )
"""
