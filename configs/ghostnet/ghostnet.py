# Where the official ImageNet file is. To take it from a folder or a mirror,
# name it in the environment variable GHOSTNET_IMAGENET.
root = '{{$GHOSTNET_IMAGENET:https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/ghostnet_pth}}'  # noqa: E501
ghostnet = f'{root}/ghostnet_1x.pth'
del root
