"""Every field of a configuration, with its default and its meaning.

Other files of this folder call `get_config()` here and change a few fields.
Any field can be set from the command line: `--config.train.batch_size=16`.
Where a default comes from, and what was measured, stands in docs/method.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the default configuration; it names no data set."""
  config = ml_collections.ConfigDict()
  # Seeds everything: initial weights, held-out split, order, anomalies.
  config.seed = 0
  # Type of the computation, 'float32' or 'bfloat16'. Parameters, statistics,
  # losses and maps are float32 either way.
  config.dtype = 'float32'
  config.data = _data()
  config.synthesis = _synthesis()
  config.teacher = _teacher()
  config.student = _student()
  config.head = _head()
  config.loss = _loss()
  config.train = _train()
  config.calibration = _calibration()
  config.eval = _eval()
  config.mesh = _mesh()
  # {category: {'synthesis': {'foreground': 'otsu'}}}: what differs by category;
  # `--config.per_category.screw.synthesis.foreground=off` changes an entry.
  config.per_category = ml_collections.ConfigDict()
  return config


def _data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  # Layout of the images: 'mvtec_ad', 'mvtec_loco', 'visa', 'btad', 'mpdd',
  # 'kolektorsdd2', 'magnetic_tile', or 'folder' (your own, configs/folder.py).
  data.name = 'mvtec_ad'
  # Folder that holds one folder per category, or the set as it was unpacked.
  # For 'folder': where the relative paths of the next four fields start.
  data.root = ''
  # For 'folder': normal images, a directory (with all below it) or a glob.
  data.normal = ''
  # Defective images, likewise; folders in it name kinds of defects. '' means
  # that there are none: training and prediction only, every metric is null.
  data.defect = ''
  # Directory of their masks, ID.png or ID_mask.png for ID.jpg, in the same
  # folders or all in one. '' means image metrics only.
  data.masks = ''
  # Normal images for the test. '' means that, if there are defects, this share
  # of data.normal is held for the test, drawn by this seed (not config.seed:
  # runs of several seeds are tested on the same images).
  data.test_normal = ''
  data.test_fraction = 0.2
  data.test_seed = 0
  # 'surface': generate the demo's set of surfaces into data.root first.
  data.generate = ''
  # The category, or a comma list; each is trained and evaluated by itself.
  data.category = ''
  # Folder of texture images (DTD's `images`, or any), searched recursively;
  # 'tfds:dtd', DTD as TensorFlow Datasets prepared it, in TFDS_DATA_DIR or
  # ~/tensorflow_datasets; '' means procedural textures.
  data.textures = ''
  # At most this many textures are kept in memory.
  data.max_textures = 1000
  # Images are resized to this square, in pixels; a multiple of 32 unless they
  # are cut into tiles.
  data.image_size = 256
  # For high resolution: the model sees square tiles of this side, a multiple of
  # 32, in training and after; their maps are joined again. 0 is whole images.
  data.tile_size = 0
  # Share of its side that a tile has in common with the next, at least; 0 to
  # 0.75. Without any, maps have seams.
  data.tile_overlap = 0.25
  # What to do with an image that cannot be read: 'error' or 'skip'.
  data.on_bad_image = 'error'
  # Share of train/good held out for calibration, never trained on, and the
  # least number of images held out.
  data.holdout_fraction = 0.1
  data.holdout_min = 4
  return data


def _synthesis() -> ml_collections.ConfigDict:
  synthesis = ml_collections.ConfigDict()
  # Perlin noise above this is anomalous.
  synthesis.threshold = 0.5
  # The noise is rotated by up to so many degrees either way.
  synthesis.rotation_degrees = 90.0
  # b ~ U(0, opacity_max); inside the mask x_a = (1 - b) filling + b x.
  synthesis.opacity_max = 0.8
  # Share of the pairs without an anomaly (x_a = x_n).
  synthesis.clean_share = 0.1
  # Share of the anomalies that are one large region instead of Perlin blobs,
  # and the bounds of its area as a share of the image.
  synthesis.region_share = 0.25
  synthesis.region_area_min = 0.02
  synthesis.region_area_max = 0.4
  # Share of the anomalies filled from elsewhere in the same image, from 1/64
  # to 1/2 of its side away.
  synthesis.self_share = 0.5
  # A pixel that would change by less than this in every channel is left as it
  # was, outside the mask.
  synthesis.min_contrast = 0.02
  # Turn the input by a random multiple of 90 degrees, and by up to so many
  # degrees either way, before the anomaly is painted.
  synthesis.rotate_90 = False
  synthesis.rotate_degrees = 0.0
  # Multiply the input's brightness by 1 - this to 1 + this, also before: what
  # a lamp does is no anomaly.
  synthesis.lighting = 0.0
  # Paint anomalies on the object alone: 'off', 'otsu' (by brightness) or
  # 'grabcut' (refined by colour). Masks are cached in the user's cache folder.
  synthesis.foreground = 'off'
  # Alter each texture in three of ten ways (colours, contrast, sharpness,
  # rotation), as DRAEM does.
  synthesis.texture_augment = False
  return synthesis


def _teacher() -> ml_collections.ConfigDict:
  teacher = ml_collections.ConfigDict()
  # 'resnet18', 'resnet34', 'resnet50' or 'wide_resnet50_2'.
  teacher.arch = 'resnet18'
  # 'hub' (timm/<arch>.tv_in1k, cached), a .safetensors or .npz file with
  # torchvision's names, or 'random'.
  teacher.weights = 'hub'
  return teacher


def _student() -> ml_collections.ConfigDict:
  student = ml_collections.ConfigDict()
  # 'encoder_decoder', 'reverse' or 'encoder'.
  student.trunk = 'reverse'
  # 1x1 convolutions per branch beyond the one that decouples.
  student.extra_convs = 0
  # True keeps AIM's gradient out of the trunk.
  student.stop_abnormality_gradient = False
  # Compute the residual blocks' activations again for the gradient instead of
  # keeping them: less memory, more time, the same numbers.
  student.remat = False
  # A second trunk, `reverse`, on a smaller copy of the image: its side divided
  # by 2 or 4. It sees whole objects, and so a part that is missing or moved.
  # 0 trains no second trunk.
  student.context = 0
  # Channels of its bottleneck. 512, as in the trunk `reverse`, makes a step of
  # 4 pairs at 256 pixels a third longer.
  student.context_width = 256
  return student


def _head() -> ml_collections.ConfigDict:
  head = ml_collections.ConfigDict()
  # 'multi_perception', 'destseg', or 'none' (the maps alone).
  head.kind = 'multi_perception'
  # 'maps' (cosine distances) or 'products' (of L2-normalised features).
  head.input = 'maps'
  # Channels of each perception.
  head.width = 32
  # Dilations of the parallel convolutions; 1 is a 1x1 convolution.
  head.dilations = (1, 6, 12, 18)
  # Gates of the channels and of the positions, each by its own statistics.
  head.channel_attention = True
  head.spatial_attention = True
  # Weight of the standardised distance in the final map, beside the 1 of the
  # head's standardised probability; 0 is the head alone.
  head.maps_weight = 1.0
  # The same weight of the head's probability, in the place of its 1, for the
  # image score; 1 scores an image by the final map itself, which is better
  # where the student has had a few hundred steps alone.
  head.score_weight = 0.25
  # The distance is the mean of the normality maps times this plus that of the
  # abnormality maps times the rest of 1; 0.5 is the plain mean of all maps.
  head.normality_share = 0.9
  # True uses the maps of a branch whose loss has the weight 0 too, as old
  # checkpoints do.
  head.untrained_maps = False
  # With student.context: weight of the second trunk in the distance, 0 to 1.
  head.context_share = 0.5
  # How the distances of the two trunks become one: 'mean', or
  # 'root_mean_square', which keeps more of what one trunk alone sees.
  head.context_fusion = 'root_mean_square'
  # Take from that distance, in the fifth of the positions where its mean over
  # training images is highest, what it is above the others there: what is far
  # from the teacher on every image is no defect.
  head.position_bias = True
  # So many positions (of 4 pixels) at each edge of the distance maps take the
  # value of the nearest one inside; 0 to 3.
  head.border = 0
  return head


def _loss() -> ml_collections.ConfigDict:
  loss = ml_collections.ConfigDict()
  # Weights of the two distillation losses; 0 switches one off, and its branch's
  # maps are then left out (see head.untrained_maps).
  loss.ngm_weight = 1.0
  loss.aim_weight = 1.0
  # A position counts by its own distance to this power, in NGM and in AIM's
  # 'match_mask': the worst positions (with ngm_flat, images) count most. 0 is
  # the plain mean, 4 the most.
  loss.focus = 1.0
  # One cosine per image over the whole feature map instead of per position.
  loss.ngm_flat = False
  # NGM counts normal positions only.
  loss.ngm_normal_only = False
  # The student also sees x_n (twice the cost of its pass).
  loss.on_normal = False
  # 'match_mask' (mean |D - M|) or 'margin' (anomalous positions only).
  loss.aim = 'match_mask'
  loss.aim_margin = 1.0
  # AIM's target: the teacher's features of 'image' (x_a) or 'normal' (x_n).
  loss.aim_target = 'image'
  # 'focal_l1' (gamma 4) or 'focal_dice' (gamma 2, alpha .25).
  loss.segmentation = 'focal_l1'
  return loss


def _train() -> ml_collections.ConfigDict:
  train = ml_collections.ConfigDict()
  # Pairs per step, over all devices and hosts.
  train.batch_size = 32
  # Pairs at a time, over all devices and hosts: a step adds up the gradients of
  # batch_size / microbatch parts. 0 takes the batch at once. The update is the
  # same but for what is normalised over the rows at hand: batch norm's
  # statistics, and the sums of loss.focus, loss.ngm_normal_only and the margin.
  train.microbatch = 0
  # Steps in all, and how many of them, the first, train the student; the
  # rest train the head on the frozen student.
  train.total_steps = 5000
  train.distill_steps = 4000
  # True trains student and head together in every step.
  train.joint = False
  train.student = _optimizer('muon', 5e-3)
  train.head = _optimizer('adam', 5e-3)
  # Keep the teacher's features of the defect-free images (x_n) in memory and
  # run it on x_a alone. On every device, 1.8 MB an image with resnet18 at 256
  # pixels, 7.3 MB with the wider ones, half in bfloat16; four times that with
  # synthesis.rotate_90. Not possible with synthesis.rotate_degrees
  # or synthesis.lighting.
  train.cache_teacher = False
  # Steps between log lines, and between checkpoints.
  train.log_every = 50
  train.checkpoint_every = 500
  # Checkpoints kept, the last ones.
  train.keep_checkpoints = 2
  return train


def _optimizer(kind: str, learning_rate: float) -> ml_collections.ConfigDict:
  optimizer = ml_collections.ConfigDict()
  # 'muon' (kernels of convolutions by Muon, all else by Adam with Nesterov's
  # momentum), 'adam' (adamw when weight_decay > 0) or 'sgd'.
  optimizer.kind = kind
  # Peak, after a linear warm-up over that share of the part's steps; then a
  # cosine to zero ('cosine') or no change ('constant').
  optimizer.learning_rate = learning_rate
  # muon: the kernels' peak, in place of that.
  optimizer.muon_learning_rate = 0.02
  optimizer.warmup_fraction = 0.05
  optimizer.schedule = 'cosine'
  # Adam's decay rates; sgd uses b1 as its momentum, Muon's own is 0.95.
  optimizer.b1 = 0.5
  optimizer.b2 = 0.999
  # muon: of the kernels alone.
  optimizer.weight_decay = 0.0
  # Gradients are scaled to at most this global norm; 0 switches it off.
  optimizer.clip_norm = 1.0
  return optimizer


def _mesh() -> ml_collections.ConfigDict:
  mesh = ml_collections.ConfigDict()
  # The devices in so many groups, each of which trains its share of the
  # categories by itself, in a process of its own; over several hosts, a
  # multiple of their number. 1 trains one category at a time on all devices.
  mesh.category_groups = 1
  return mesh


def _calibration() -> ml_collections.ConfigDict:
  calibration = ml_collections.ConfigDict()
  # Shares of normal images, and of their pixels, that may lie above the
  # thresholds. Where the held-out images are too few to count such a share of
  # them, their scores are taken as normally distributed; 0 is their highest.
  calibration.image_fpr = 0.01
  calibration.pixel_fpr = 0.001
  return calibration


def _eval() -> ml_collections.ConfigDict:
  evaluation = ml_collections.ConfigDict()
  # Images, or tiles, at once, also when calibrating; it does not change the
  # figures.
  evaluation.batch_size = 16
  # The image score is the mean of so many highest pixels of the map at
  # data.image_size; 1 is the maximum.
  evaluation.score_top_pixels = 100
  # Gaussian smoothing of the maps, in pixels of data.image_size; 0 is none.
  evaluation.smoothing_sigma = 0.0
  # Where pixel metrics are computed: 'model' (data.image_size), 'native' (maps
  # resized to each mask's own size, as MVTec's evaluation asks), or both.
  evaluation.resolutions = ('model',)
  # Bootstrap resamples of the test images for 95 % intervals; 0 is none.
  evaluation.bootstrap = 0
  # Overlays of so many of the highest- and lowest-scored images of each label.
  evaluation.pictures = 4
  return evaluation
