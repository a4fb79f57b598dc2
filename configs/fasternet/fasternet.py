# What all configs of the family share.
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)

# Where the official ImageNet files are. To take them from a folder or a
# mirror, name it in the environment variable FASTERNET_IMAGENET.
root = '{{$FASTERNET_IMAGENET:https://github.com/JierunChen/FasterNet/releases/download/v1.0}}'  # noqa: E501
imagenet = dict(
    t0=f'{root}/fasternet_t0-epoch.281-val_acc1.71.9180.pth',
    t1=f'{root}/fasternet_t1-epoch.291-val_acc1.76.2180.pth',
    t2=f'{root}/fasternet_t2-epoch.289-val_acc1.78.8860.pth',
    s=f'{root}/fasternet_s-epoch.299-val_acc1.81.2840.pth',
    m=f'{root}/fasternet_m-epoch.291-val_acc1.82.9620.pth',
    l=f'{root}/fasternet_l-epoch.299-val_acc1.83.5060.pth',
)
del root
