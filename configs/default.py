"""Every field of a configuration, with its default and its meaning.

Other files of this folder call `get_config()` here and change a few fields.
Any field can be set from the command line: `--config.train.batch_size=16`.
docs/method.md says where each default comes from, docs/experiments/ what was
measured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the default configuration; it names no data set."""
  config = ml_collections.ConfigDict()
  # Seeds everything: initial weights, held-out split, order, anomalies.
  config.seed = 0
  # Type of the computation, 'float32' or 'bfloat16'. Parameters, statistics,
  # losses and maps are float32 with either.
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
  # Fields that differ by category: {category: {'synthesis': {'foreground':
  # 'otsu'}}}. `--config.per_category.screw.synthesis.foreground=off` changes an
  # entry.
  config.per_category = ml_collections.ConfigDict()
  return config


def _data() -> ml_collections.ConfigDict:
  data = ml_collections.ConfigDict()
  # Layout of the images: 'mvtec_ad', 'mvtec_loco', 'mvtec_ad_2', 'visa',
  # 'btad', 'mpdd', 'kolektorsdd2', 'magnetic_tile', or 'folder' (your own,
  # configs/folder.py).
  data.name = 'mvtec_ad'
  # Folder that holds one folder per category, or the unpacked set.
  # For 'folder': where relative paths of the next four fields start.
  data.root = ''
  # For 'folder': normal images: a directory (with all below it), a glob, or a
  # list, FILE.txt with a path a line, relative to the list.
  data.normal = ''
  # For 'folder': defective images, named like the normal ones; folders in it
  # name the kinds of defects. '' means none: training and prediction only,
  # every metric is null.
  data.defect = ''
  # For 'folder': directory of the defects' masks, ID.png or ID_mask.png for
  # ID.jpg, in the same folders or all in one. '' means image metrics only.
  data.masks = ''
  # For 'folder': normal images for the test. '' means that, if there are
  # defects, data.test_fraction of data.normal is kept for the test.
  data.test_normal = ''
  # This share of the normal images is kept for the test, drawn by
  # data.test_seed. config.seed does not change it, so that runs of several
  # seeds are tested on the same images.
  data.test_fraction = 0.2
  data.test_seed = 0
  # 'surface' first generates the demo's set of surfaces into data.root.
  data.generate = ''
  # One category or a comma list; each is trained and evaluated by itself.
  data.category = ''
  # Folder of texture images (DTD's `images`, or any), searched recursively.
  # 'tfds:dtd' is DTD as TensorFlow Datasets prepared it, in TFDS_DATA_DIR or
  # ~/tensorflow_datasets. '' means procedural textures.
  data.textures = ''
  # At most this many textures are kept in memory.
  data.max_textures = 1000
  # Side of the square to which images are resized, in pixels. A multiple of 32,
  # unless images are cut into tiles.
  data.image_size = 256
  # For high resolution: the model sees square tiles of this side in pixels, a
  # multiple of 32, in training and afterwards. Their maps are joined again.
  # 0 means whole images.
  data.tile_size = 0
  # Least share of its side that a tile has in common with the next, 0 to 0.75.
  # With 0, maps have seams.
  data.tile_overlap = 0.25
  # An image with more pixels than this is refused. It can only be raised: for
  # line-scan images, for example.
  data.max_pixels = 178_956_970
  # The value of 16-bit greyscale files that is white, say 4095 for a camera of
  # 12 bits. 0 is the full range, 65535.
  data.white_level = 0
  # What to do with an image that cannot be read: 'error' or 'skip'.
  data.on_bad_image = 'error'
  # Share of train/good that is held out for calibration and never trained on,
  # and the least number of images held out.
  data.holdout_fraction = 0.1
  data.holdout_min = 4
  return data


def _synthesis() -> ml_collections.ConfigDict:
  synthesis = ml_collections.ConfigDict()
  # Perlin noise above this value is anomalous.
  synthesis.threshold = 0.5
  # The noise is rotated by at most this many degrees either way.
  synthesis.rotation_degrees = 90.0
  # Inside the mask x_a = (1 - b) filling + b x, with b ~ U(0, opacity_max).
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
  # A pixel that would change by less than this in every channel, of images in
  # [0, 1], stays as it was and leaves the mask.
  synthesis.min_contrast = 0.02
  # Turn the input, before the anomaly is painted, by a random multiple of 90
  # degrees (rotate_90) and by at most rotate_degrees either way. Set them for
  # production lines where parts arrive rotated.
  synthesis.rotate_90 = False
  synthesis.rotate_degrees = 0.0
  # Multiply the input's brightness by 1 - lighting to 1 + lighting, before the
  # anomaly is painted. Set it for lines whose lamps change.
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
  # 'hub' (timm/<arch>.tv_in1k, cached), 'random', or the path of a .safetensors
  # or .npz file with torchvision's names.
  teacher.weights = 'hub'
  return teacher


def _student() -> ml_collections.ConfigDict:
  student = ml_collections.ConfigDict()
  # 'encoder_decoder', 'reverse' or 'encoder'; see dmdd_jax/models/student.py.
  student.trunk = 'reverse'
  # Number of 1x1 convolutions per branch after the one that decouples.
  student.extra_convs = 0
  # True stops AIM's gradient before the trunk.
  student.stop_abnormality_gradient = False
  # True computes the residual blocks' activations again for the gradient
  # instead of keeping them: less memory, more time, the same numbers.
  student.remat = False
  # Levels of the teacher that the trunk reproduces, from the finest on: 1 to 3.
  # With a second trunk 2 saves a third of the first one's time.
  student.levels = 3
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
  # 'multi_perception', 'destseg', or 'none' (the distance maps alone).
  head.kind = 'multi_perception'
  # Input of the head: 'maps' (cosine distances) or 'products' (of L2-normalised
  # features).
  head.input = 'maps'
  # Channels of each parallel convolution.
  head.width = 32
  # Dilations of the parallel convolutions; 1 is a 1x1 convolution.
  head.dilations = (1, 6, 12, 18)
  # Attention: a gate per channel and a gate per position, each computed from
  # its own statistics.
  head.channel_attention = True
  head.spatial_attention = True
  # Weight of the standardised distance in the final map. The head's
  # standardised probability has weight 1; 0 is the head alone.
  head.maps_weight = 1.0
  # Weight of the head in the image score (in the map it is 1); 0 scores by
  # distance alone. 1 is better after trainings of only a few hundred steps.
  head.score_weight = 0.25
  # Share s of the normality maps in the distance: s times their mean plus (1 -
  # s) times the mean of the abnormality maps. 0.5 is the plain mean of all.
  head.normality_share = 0.9
  # True uses the maps of a branch whose loss has the weight 0 too, as old
  # checkpoints do.
  head.untrained_maps = False
  # With student.context: weight of the second trunk in the distance, 0 to 1.
  head.context_share = 0.5
  # How the distances of the two trunks become one: 'mean', or
  # 'root_mean_square', which keeps more of what one trunk alone sees.
  head.context_fusion = 'root_mean_square'
  # Subtract the bias of a position from the distance. The fifth of the
  # positions with the highest mean over training images have one: the excess of
  # the mean over the other positions. What is far from the teacher on every
  # image is no defect.
  head.position_bias = True
  # Number of positions (of 4 pixels) at each edge of the distance maps that
  # take the value of the nearest one inside; 0 to 3.
  head.border = 0
  return head


def _loss() -> ml_collections.ConfigDict:
  loss = ml_collections.ConfigDict()
  # Weights of the two distillation losses; 0 switches one off, and its branch's
  # maps are then left out (see head.untrained_maps).
  # Weights of the two distillation losses. 0 switches a loss off; the maps of
  # its branch are then not used.
  loss.ngm_weight = 1.0
  loss.aim_weight = 1.0
  # A position is weighted by its own distance to this power, in NGM and in
  # AIM's 'match_mask', so that the worst positions (with ngm_flat, images)
  # count most. 0 is the plain mean; at most 4.
  loss.focus = 1.0
  # True takes one cosine per image over the whole feature map, instead of one
  # per position.
  loss.ngm_flat = False
  # True makes NGM count normal positions only.
  loss.ngm_normal_only = False
  # True shows the student x_n too, at twice the cost of its pass.
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
  # batch_size / microbatch parts. 0 takes the whole batch at once. The update
  # is the same, except for what is normalised over the rows of a part: batch
  # norm's statistics, and the sums of loss.focus, loss.ngm_normal_only and the
  # margin.
  train.microbatch = 0
  # Number of steps. The first distill_steps of them train the student; the rest
  # train the head on the frozen student.
  train.total_steps = 5000
  train.distill_steps = 4000
  # True trains student and head together in every step.
  train.joint = False
  train.student = _optimizer('muon', 5e-3)
  train.head = _optimizer('adam', 5e-3)
  # True keeps the teacher's features of the defect-free images (x_n) in memory
  # and runs it on x_a alone. On every device an image takes 1.8 MB with
  # resnet18 at 256 pixels, 7.3 MB with the wider ones, half of it in bfloat16,
  # and four times as much with synthesis.rotate_90. Not possible with
  # synthesis.rotate_degrees or synthesis.lighting.
  train.cache_teacher = False
  # Number of steps between log lines, and between checkpoints.
  train.log_every = 50
  train.checkpoint_every = 500
  # Number of checkpoints kept, the newest ones.
  train.keep_checkpoints = 2
  return train


def _optimizer(kind: str, learning_rate: float) -> ml_collections.ConfigDict:
  optimizer = ml_collections.ConfigDict()
  # 'muon' (kernels of convolutions by Muon, everything else by Adam with
  # Nesterov's momentum), 'adam' (adamw if weight_decay > 0) or 'sgd'.
  optimizer.kind = kind
  # Peak of the learning rate. It is reached by a linear warm-up over
  # warmup_fraction of the steps of this part (student or head). After it the
  # schedule is a cosine to zero ('cosine') or no change ('constant').
  optimizer.learning_rate = learning_rate
  # For 'muon': the peak for the kernels, instead of learning_rate.
  optimizer.muon_learning_rate = 0.02
  optimizer.warmup_fraction = 0.05
  optimizer.schedule = 'cosine'
  # Adam's decay rates. 'sgd' uses b1 as its momentum; Muon's own is 0.95.
  optimizer.b1 = 0.5
  optimizer.b2 = 0.999
  # With 'muon' it applies to the kernels alone.
  optimizer.weight_decay = 0.0
  # Gradients are scaled to at most this global norm; 0 switches it off.
  optimizer.clip_norm = 1.0
  return optimizer


def _mesh() -> ml_collections.ConfigDict:
  mesh = ml_collections.ConfigDict()
  # Number of groups of devices. Each group trains its share of the categories
  # in a process of its own. With several hosts, a multiple of their number. 1
  # trains one category at a time on all devices.
  mesh.category_groups = 1
  return mesh


def _calibration() -> ml_collections.ConfigDict:
  calibration = ml_collections.ConfigDict()
  # Shares of normal images, and of their pixels, that may lie above the
  # thresholds. Where the held-out images are too few to count such a share,
  # their scores are assumed to be normally distributed. 0 is their highest
  # score.
  calibration.image_fpr = 0.01
  calibration.pixel_fpr = 0.001
  # Number of training images, at most, whose scores help to set the image
  # threshold: they are moved to the level of the held-out scores and show how
  # far a rare good image lies above the rest. 0 uses held-out images alone, as
  # happens where images are cut into tiles.
  calibration.training_images = 200
  return calibration


def _eval() -> ml_collections.ConfigDict:
  evaluation = ml_collections.ConfigDict()
  # Number of images (or of tiles, if images are cut) at a time, in calibration
  # too. It does not change the figures.
  evaluation.batch_size = 16
  # The image score is the mean of this many highest pixels of the map at
  # data.image_size; 1 is the maximum.
  evaluation.score_top_pixels = 100
  # Standard deviation of the Gaussian that smooths the maps, in pixels of
  # data.image_size; 0 is no smoothing.
  evaluation.smoothing_sigma = 0.0
  # Where pixel metrics are computed: 'model' (data.image_size), 'native' (maps
  # resized to each mask's own size, as MVTec's evaluation asks), or both.
  evaluation.resolutions = ('model',)
  # Whether the metrics of test images get 95 % intervals.
  evaluation.intervals = True
  # Number of overlays written of the highest- and of the lowest-scored images
  # of each label.
  evaluation.pictures = 4
  return evaluation
