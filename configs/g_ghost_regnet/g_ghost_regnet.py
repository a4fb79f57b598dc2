# What all configs of the family share.
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)

# Where the official ImageNet files are. To take them from a folder or a
# mirror, name it in the environment variable G_GHOST_IMAGENET.
root = '{{$G_GHOST_IMAGENET:https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/g_ghost_regnet}}'  # noqa: E501
imagenet = {
    '032': f'{root}/g_ghost_regnet_3.2g_77.8.pth',
    '040': f'{root}/g_ghost_regnet_4.0g_78.6.pth',
    '080': f'{root}/g_ghost_regnet_8.0g_79.0.pth',
    '160': f'{root}/g_ghost_regnet_16.0g_79.9.pth',
}
del root
