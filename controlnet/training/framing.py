"""What resizing and cropping do to a folder's images, in numbers."""

from collections import Counter
from statistics import fmean

from .sources import FolderSource, Source
from .transform import Transform, bucket_sizes, cropped_share, enlargement


def framing(source: Source, multiple: int) -> list[str]:
    """Sentences on buckets, crops and images that are enlarged, from the images' headers; none for what fits as it is.

    `multiple` is what the sides of buckets would be multiples of.
    """
    if not isinstance(source, FolderSource):
        return []
    looked_at = {entry.image: source.image_size(i) for i, entry in enumerate(source.entries)}
    sizes = {file: size for file, size in looked_at.items() if size is not None}
    if not sizes:
        return []
    transform = source.transform
    framed = {file: transform.size_for(size) for file, size in sizes.items()}
    lines, to = [], f"{transform.size[1]}x{transform.size[0]}"
    if transform.buckets:
        to, counts = "the buckets", Counter(framed.values())
        most = ", ".join(f"{width}x{height} for {count}" for (height, width), count in counts.most_common(8))
        lines.append(f"images of {len(counts)} sizes (width x height): {most}{' ...' if len(counts) > 8 else ''}")
    crops = {file: cropped_share(size, framed[file]) for file, size in sizes.items()}
    mean, worst = fmean(crops.values()), max(crops, key=crops.get)
    if crops[worst] >= 0.01:
        words = f'the crop to {to} takes {mean:.0%} of an image on average, at most {crops[worst]:.0%} ("{worst}")'
        if not transform.buckets:
            bucketed = Transform(transform.size, buckets=bucket_sizes(transform.size, multiple))
            less = fmean(cropped_share(size, bucketed.size_for(size)) for size in sizes.values())
            words += f"; with --buckets {less:.0%} on average" if less < mean - 0.01 else ""
        lines.append(words)
    scales = {file: enlargement(size, framed[file]) for file, size in sizes.items()}
    enlarged, smallest = sum(scale > 1 for scale in scales.values()), max(scales, key=scales.get)
    if enlarged:
        lines.append(
            f"{enlarged} of {len(scales)} images are smaller than {to} and are enlarged, at most "
            f'{scales[smallest]:.1f} times ("{smallest}")'
        )
    return lines
