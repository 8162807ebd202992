"""What resizing and cropping do to a folder's images, in numbers."""

from collections import Counter

from .sources import FolderSource, Source
from .transform import Transform, bucket_sizes, cropped_share, enlargement


def framing(source: Source, multiple: int) -> list[str]:
    """Sentences on buckets, crops and images that are enlarged, from the images' headers; none for what fits as it is.

    `multiple` is what the sides of buckets would be multiples of.
    """
    if not isinstance(source, FolderSource):
        return []
    transform, sizes = source.transform, {}
    for i, entry in enumerate(source.entries):
        if (size := source.image_size(i)) is not None:
            sizes[entry.image] = size
    if not sizes:
        return []
    to = f"{transform.size[1]}x{transform.size[0]}" if not transform.buckets else "the buckets"
    crops = {file: cropped_share(size, transform.size_for(size)) for file, size in sizes.items()}
    scales = {file: enlargement(size, transform.size_for(size)) for file, size in sizes.items()}
    worst, smallest = max(crops, key=crops.get), max(scales, key=scales.get)
    lines = buckets(sizes.values(), transform)
    if crops[worst] >= 0.01:
        mean = sum(crops.values()) / len(crops)
        lines.append(
            f'the crop to {to} takes {mean:.0%} of an image on average, at most {crops[worst]:.0%} ("{worst}")'
        )
        if not transform.buckets:
            bucketed = Transform(transform.size, buckets=bucket_sizes(transform.size, multiple))
            less = sum(cropped_share(size, bucketed.size_for(size)) for size in sizes.values()) / len(sizes)
            lines[-1] += f"; with --buckets {less:.0%} on average" if less < mean - 0.01 else ""
    enlarged = sum(scale > 1 for scale in scales.values())
    if enlarged:
        lines.append(
            f"{enlarged} of {len(scales)} images are smaller than {to} and are enlarged, at most "
            f'{scales[smallest]:.1f} times ("{smallest}")'
        )
    return lines


def buckets(sizes, transform: Transform) -> list[str]:
    if not transform.buckets:
        return []
    counts = Counter(transform.size_for(size) for size in sizes)
    most = ", ".join(f"{width}x{height} for {count}" for (height, width), count in counts.most_common(8))
    return [f"images of {len(counts)} sizes (width x height): {most}{' ...' if len(counts) > 8 else ''}"]
